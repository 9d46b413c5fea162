"""From predicted tensors to a plan, and from the plan into the model or a file."""
