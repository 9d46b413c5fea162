"""Recurrent layers, and sequences of several lengths that are packed for them."""

from __future__ import annotations

from typing import Any

import torch

from ghn_init._tracing.kernels import empty
from ghn_init._tracing.outputs.call import Call, Known, output_of


@output_of("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> Any:
    """(*, features of both directions) and the last states, without going through all steps.

    A packed sequence has its batch sizes before the states.
    """
    if not call.varies:
        return call.run()
    packed = isinstance(call.args[3], (list, tuple))
    x, states, bidirectional = call.args[0], call.args[2 if packed else 1], call.args[8 if packed else 7]
    several = isinstance(states, (list, tuple))
    hidden = states[0] if several else states
    output = empty(x, (*x.shape[:-1], hidden.shape[-1] * (2 if bidirectional else 1)))
    last = states if several else (states,)
    return (output, *(torch.empty_like(state, device=x.device) for state in last))


@output_of("_pack_padded_sequence")
def packed(call: Call) -> Any:
    """(all steps, *) and, on the CPU, how many sequences go on at every step.

    The lengths are values: those of the example input, else every sequence is as long as there is place.
    """
    x, lengths, batch_first = call.args
    longest = x.shape[1 if batch_first else 0]
    given = lengths.tolist() if not lengths.is_meta else [longest] * x.shape[0 if batch_first else 1]
    if max(given, default=0) > longest:
        raise ValueError(f"a length of {max(given)} for sequences of {longest} steps")
    sizes = torch.tensor([sum(length > step for length in given) for step in range(max(given, default=0))])
    return Known((empty(x, (sum(given), *x.shape[2:])), sizes))


@output_of("_pad_packed_sequence")
def padded(call: Call) -> Any:
    """(sequences, steps, *) or (steps, sequences, *), and the lengths."""
    data, sizes, batch_first = call.args[:3]
    total = call.arg(4, "total_length", -1)
    steps = max(len(sizes), total)
    counts = sizes.tolist()
    first = counts[0] if counts else 0
    lengths = torch.tensor([sum(count > index for count in counts) for index in range(first)])
    shape = (first, steps) if batch_first else (steps, first)
    return Known((empty(data, (*shape, *data.shape[1:])), lengths))
