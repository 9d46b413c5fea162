"""Small networks of transformers, with random weights: text, vision, audio and several at once.

Each is a model class, its configuration class and the options that make it small; nothing is downloaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn


@dataclass(frozen=True)
class Small:
    """A small network.

    Attributes:
        kind: "text", "vision", "audio" or "several", by what its input is.
        model: Name of its class in transformers.
        config: Name of the class of its configuration.
        options: Of the configuration.
    """

    kind: str
    model: str
    config: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self) -> nn.Module:
        """The network, with random weights."""
        import transformers

        config = getattr(transformers, self.config)(**self.options)
        return getattr(transformers, self.model)(config)


def configurations() -> list[tuple[str, str, Callable[[], nn.Module]]]:
    """Name, kind and builder of every network on the list."""
    return [(network.model, network.kind, network) for network in NETWORKS]


_BODY: Final = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64,
}  # fmt: skip
_TOKENS: Final = {"vocab_size": 99, "max_position_embeddings": 64, "pad_token_id": 0}
_SPECIAL: Final = {"bos_token_id": 1, "eos_token_id": 2}
_TEXT: Final = {**_BODY, **_TOKENS}
_DECODER: Final = {**_TEXT, **_SPECIAL, "num_key_value_heads": 2}
_EXPERTS: Final = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
_SEQ2SEQ: Final = {
    **_TOKENS, **_SPECIAL, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
    "decoder_start_token_id": 2,
}  # fmt: skip
_T5: Final = {
    "vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0,
}  # fmt: skip
_PATCHES: Final = {**_BODY, "image_size": 32, "patch_size": 8}
_STAGES: Final = {"hidden_sizes": [8, 16, 16, 32], "depths": [1, 1, 1, 1]}
_WINDOWS: Final = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4],
                   "window_size": 4}  # fmt: skip
_SPEECH: Final = {
    **_BODY, "vocab_size": 32, "conv_dim": [16, 16], "conv_stride": [5, 2], "conv_kernel": [10, 3],
    "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_CLIP: Final = {
    "text_config": {**_TEXT, **_SPECIAL, "projection_dim": 16},
    "vision_config": {**_PATCHES, "projection_dim": 16},
    "projection_dim": 16,
}
_RESNET: Final = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
_DETR: Final = {
    "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 10,
}  # fmt: skip


def _text(model: str, config: str, **options: Any) -> Small:
    return Small("text", model, config, options)


def _vision(model: str, config: str, **options: Any) -> Small:
    return Small("vision", model, config, options)


def _audio(model: str, config: str, **options: Any) -> Small:
    return Small("audio", model, config, options)


def _several(model: str, config: str, **options: Any) -> Small:
    return Small("several", model, config, options)


def _resnet() -> dict[str, Any]:
    """A ResNet as the backbone of a detector, so that no weights of timm's are asked for."""
    return {"model_type": "resnet", **_RESNET, "out_features": ["stage1", "stage2"]}


_ENCODERS: Final = (
    _text("AlbertForMaskedLM", "AlbertConfig", **_TEXT, embedding_size=16),
    _text("BertForSequenceClassification", "BertConfig", **_TEXT),
    _text("BertForMaskedLM", "BertConfig", **_TEXT),
    _text("BigBirdForMaskedLM", "BigBirdConfig", **_TEXT, attention_type="original_full"),
    _text("CamembertForMaskedLM", "CamembertConfig", **_TEXT),
    _text("CanineModel", "CanineConfig", **_TEXT, num_hash_buckets=64, local_transformer_stride=16),
    _text("ConvBertForMaskedLM", "ConvBertConfig", **_TEXT, embedding_size=16),
    _text("DebertaForSequenceClassification", "DebertaConfig", **_TEXT),
    _text("DebertaV2ForSequenceClassification", "DebertaV2Config", **_TEXT, relative_attention=True,
          position_buckets=16, pos_att_type=["p2c", "c2p"]),
    _text("DistilBertForSequenceClassification", "DistilBertConfig", vocab_size=99, dim=32, n_layers=2,
          n_heads=4, hidden_dim=64, max_position_embeddings=64),
    _text("ElectraForSequenceClassification", "ElectraConfig", **_TEXT, embedding_size=16),
    _text("FNetForMaskedLM", "FNetConfig", **_TEXT),
    _text("FunnelForSequenceClassification", "FunnelConfig", vocab_size=99, d_model=32, n_head=4, d_head=8,
          d_inner=64, block_sizes=[1, 1]),
    _text("IBertForMaskedLM", "IBertConfig", **_TEXT),
    _text("LayoutLMForSequenceClassification", "LayoutLMConfig", **_TEXT),
    _text("LongformerForSequenceClassification", "LongformerConfig", **_TEXT, attention_window=8),
    _text("MegatronBertForMaskedLM", "MegatronBertConfig", **_TEXT),
    _text("MobileBertForMaskedLM", "MobileBertConfig", **_TEXT, embedding_size=16, intra_bottleneck_size=16,
          num_feedforward_networks=2),
    _text("ModernBertForMaskedLM", "ModernBertConfig", **_TEXT, **_SPECIAL, cls_token_id=1, sep_token_id=2),
    _text("MPNetForMaskedLM", "MPNetConfig", **_TEXT),
    _text("NystromformerForMaskedLM", "NystromformerConfig", **_TEXT, num_landmarks=4,
          segment_means_seq_len=16),
    _text("RemBertForMaskedLM", "RemBertConfig", **_TEXT, input_embedding_size=16, output_embedding_size=16),
    _text("RobertaForSequenceClassification", "RobertaConfig", **_TEXT),
    _text("RoFormerForMaskedLM", "RoFormerConfig", **_TEXT),
    _text("SqueezeBertForMaskedLM", "SqueezeBertConfig", **_TEXT, embedding_size=32),
    _text("XLMRobertaForTokenClassification", "XLMRobertaConfig", **_TEXT),
    _text("XLNetForSequenceClassification", "XLNetConfig", vocab_size=99, d_model=32, n_layer=2, n_head=4,
          d_inner=64),
)  # fmt: skip

_GPT: Final = {"vocab_size": 99, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SPECIAL}

_DECODERS: Final = (
    _text("BioGptForCausalLM", "BioGptConfig", **_TEXT),
    _text("BloomForCausalLM", "BloomConfig", vocab_size=99, hidden_size=32, n_layer=2, n_head=4),
    _text("CodeGenForCausalLM", "CodeGenConfig", **_GPT, rotary_dim=4),
    _text("CohereForCausalLM", "CohereConfig", **_DECODER),
    _text("CTRLLMHeadModel", "CTRLConfig", **_GPT, dff=64),
    _text("DeepseekV3ForCausalLM", "DeepseekV3Config", **{**_DECODER, "num_key_value_heads": 4},
          moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1, num_experts_per_tok=2,
          kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
          first_k_dense_replace=1),
    _text("FalconForCausalLM", "FalconConfig", **_TEXT, **_SPECIAL),
    _text("FalconMambaForCausalLM", "FalconMambaConfig", vocab_size=99, hidden_size=32, num_hidden_layers=2,
          state_size=4),
    _text("Gemma2ForCausalLM", "Gemma2Config", **_DECODER, head_dim=8),
    _text("Gemma3ForCausalLM", "Gemma3TextConfig", **_DECODER, head_dim=8),
    _text("GlmForCausalLM", "GlmConfig", **_DECODER, head_dim=8),
    _text("GPT2LMHeadModel", "GPT2Config", **_GPT),
    _text("GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_GPT),
    _text("GPTJForCausalLM", "GPTJConfig", **_GPT, rotary_dim=4),
    _text("GPTNeoForCausalLM", "GPTNeoConfig", vocab_size=99, hidden_size=32, num_layers=2, num_heads=4,
          attention_types=[[["global", "local"], 1]], max_position_embeddings=64),
    _text("GPTNeoXForCausalLM", "GPTNeoXConfig", **_TEXT),
    _text("GptOssForCausalLM", "GptOssConfig", **_DECODER, head_dim=8, num_local_experts=4,
          num_experts_per_tok=2),
    _text("GraniteForCausalLM", "GraniteConfig", **_DECODER),
    _text("JambaForCausalLM", "JambaConfig", **_DECODER, num_experts=4, attn_layer_period=2,
          attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4,
          mamba_dt_rank=4, use_mamba_kernels=False),
    _text("LlamaForCausalLM", "LlamaConfig", **_DECODER),
    _text("MambaForCausalLM", "MambaConfig", vocab_size=99, hidden_size=32, num_hidden_layers=2,
          state_size=4),
    _text("Mamba2ForCausalLM", "Mamba2Config", vocab_size=99, hidden_size=32, num_hidden_layers=2,
          state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    _text("MistralForCausalLM", "MistralConfig", **_DECODER),
    _text("MixtralForCausalLM", "MixtralConfig", **_DECODER, num_local_experts=4),
    _text("MptForCausalLM", "MptConfig", vocab_size=99, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    _text("Olmo2ForCausalLM", "Olmo2Config", **_DECODER),
    _text("OlmoeForCausalLM", "OlmoeConfig", **_DECODER, num_experts=4, num_experts_per_tok=2),
    _text("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", vocab_size=99, n_embd=32, n_layer=2, n_head=4,
          n_positions=64),
    _text("OPTForCausalLM", "OPTConfig", **_TOKENS, **_SPECIAL, hidden_size=32, num_hidden_layers=2,
          num_attention_heads=4, ffn_dim=64, word_embed_proj_dim=32),
    _text("PhiForCausalLM", "PhiConfig", **_DECODER),
    _text("Phi3ForCausalLM", "Phi3Config", **_DECODER),
    _text("Qwen2ForCausalLM", "Qwen2Config", **_DECODER),
    _text("Qwen3ForCausalLM", "Qwen3Config", **_DECODER, head_dim=8),
    _text("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **_DECODER, **_EXPERTS, head_dim=8),
    _text("RwkvForCausalLM", "RwkvConfig", vocab_size=99, hidden_size=32, num_hidden_layers=2,
          attention_hidden_size=32, intermediate_size=64, context_length=64),
    _text("StableLmForCausalLM", "StableLmConfig", **_DECODER),
    _text("Starcoder2ForCausalLM", "Starcoder2Config", **_DECODER),
)  # fmt: skip

_ENCODER_DECODERS: Final = (
    _text("BartForConditionalGeneration", "BartConfig", **_SEQ2SEQ),
    _text("BlenderbotForConditionalGeneration", "BlenderbotConfig", **_SEQ2SEQ),
    _text("LEDForConditionalGeneration", "LEDConfig", **_SEQ2SEQ, attention_window=8,
          max_encoder_position_embeddings=64, max_decoder_position_embeddings=64),
    _text("LongT5ForConditionalGeneration", "LongT5Config", **_T5, local_radius=4),
    _text("M2M100ForConditionalGeneration", "M2M100Config", **_SEQ2SEQ),
    _text("MarianMTModel", "MarianConfig", **_SEQ2SEQ),
    _text("MBartForConditionalGeneration", "MBartConfig", **_SEQ2SEQ),
    _text("MT5ForConditionalGeneration", "MT5Config", **_T5),
    _text("PegasusForConditionalGeneration", "PegasusConfig", **_SEQ2SEQ),
    _text("SwitchTransformersForConditionalGeneration", "SwitchTransformersConfig", **_T5, num_experts=4,
          num_sparse_encoder_layers=1, num_sparse_decoder_layers=1),
    _text("T5ForConditionalGeneration", "T5Config", **_T5),
    _text("T5EncoderModel", "T5Config", **_T5),
)  # fmt: skip

_IMAGES: Final = (
    _vision("BeitForImageClassification", "BeitConfig", **_PATCHES),
    _vision("BitForImageClassification", "BitConfig", embedding_size=8, hidden_sizes=[32, 64], depths=[1, 1],
            num_groups=4),
    _vision("ConditionalDetrForObjectDetection", "ConditionalDetrConfig", **_DETR, backbone_config=_resnet(),
            use_timm_backbone=False, use_pretrained_backbone=False),
    _vision("ConvNextForImageClassification", "ConvNextConfig", **_STAGES, image_size=64),
    _vision("ConvNextV2ForImageClassification", "ConvNextV2Config", **_STAGES, image_size=64),
    _vision("CvtForImageClassification", "CvtConfig", embed_dim=[8, 16, 32], num_heads=[1, 2, 4],
            depth=[1, 2, 3]),
    _vision("Data2VecVisionForImageClassification", "Data2VecVisionConfig", **_PATCHES),
    _vision("DeiTForImageClassification", "DeiTConfig", **_PATCHES),
    _vision("DetrForObjectDetection", "DetrConfig", **_DETR, backbone_config=_resnet(),
            use_timm_backbone=False, use_pretrained_backbone=False),
    _vision("DPTForDepthEstimation", "DPTConfig", **{**_PATCHES, "num_hidden_layers": 4},
            backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=16),
    _vision("Dinov2ForImageClassification", "Dinov2Config", **_BODY, image_size=32, patch_size=8),
    _vision("DINOv3ViTModel", "DINOv3ViTConfig", **_PATCHES),
    _vision("EfficientNetForImageClassification", "EfficientNetConfig", image_size=64, width_coefficient=0.25,
            depth_coefficient=0.2, hidden_dim=320),
    _vision("FocalNetForImageClassification", "FocalNetConfig", image_size=64, embed_dim=16, depths=[1, 1],
            hidden_sizes=[16, 32], focal_levels=[2, 2], focal_windows=[3, 3]),
    _vision("GLPNForDepthEstimation", "GLPNConfig", hidden_sizes=[8, 16, 16, 32], depths=[1, 1, 1, 1],
            num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16),
    _vision("HieraForImageClassification", "HieraConfig", image_size=[64, 64], embed_dim=16,
            depths=[1, 1, 1, 1], num_heads=[1, 2, 4, 8]),
    _vision("ImageGPTForImageClassification", "ImageGPTConfig", **{**_GPT, "n_positions": 64}),
    _vision("LevitForImageClassification", "LevitConfig", image_size=64, hidden_sizes=[16, 32, 48],
            num_attention_heads=[1, 2, 3], depths=[1, 1, 1], key_dim=[8, 8, 8]),
    _vision("MobileNetV1ForImageClassification", "MobileNetV1Config", image_size=64, depth_multiplier=0.25),
    _vision("MobileNetV2ForImageClassification", "MobileNetV2Config", image_size=64, depth_multiplier=0.25),
    _vision("MobileViTForImageClassification", "MobileViTConfig", image_size=64, hidden_sizes=[16, 32, 32],
            neck_hidden_sizes=[8, 8, 16, 16, 16, 16, 32], num_attention_heads=4),
    _vision("MobileViTV2ForImageClassification", "MobileViTV2Config", image_size=64, width_multiplier=0.25),
    _vision("PoolFormerForImageClassification", "PoolFormerConfig", **_STAGES),
    _vision("PvtForImageClassification", "PvtConfig", image_size=64, hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
    _vision("PvtV2ForImageClassification", "PvtV2Config", image_size=64, hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4]),
    _vision("RegNetForImageClassification", "RegNetConfig", embedding_size=8, hidden_sizes=[8, 16],
            depths=[1, 1], groups_width=8),
    _vision("ResNetForImageClassification", "ResNetConfig", **_RESNET),
    _vision("RTDetrForObjectDetection", "RTDetrConfig", encoder_hidden_dim=32, d_model=32, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=4, decoder_attention_heads=4, decoder_layers=2,
            num_queries=10, num_denoising=0, encoder_in_channels=[16, 16, 16],
            decoder_in_channels=[32, 32, 32], backbone_config={
                "model_type": "rt_detr_resnet", "embedding_size": 8, "hidden_sizes": [8, 16, 16, 16],
                "depths": [1, 1, 1, 1], "layer_type": "basic",
                "out_features": ["stage2", "stage3", "stage4"]}),
    _vision("SegformerForSemanticSegmentation", "SegformerConfig", hidden_sizes=[8, 16, 16, 32],
            depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=16),
    _vision("SwiftFormerForImageClassification", "SwiftFormerConfig", image_size=64, depths=[1, 1, 1, 1],
            embed_dims=[8, 16, 16, 32]),
    _vision("SwinForImageClassification", "SwinConfig", **_WINDOWS),
    _vision("Swin2SRForImageSuperResolution", "Swin2SRConfig", image_size=16, embed_dim=16, depths=[1, 1],
            num_heads=[2, 2], window_size=4, upscale=2),
    _vision("Swinv2ForImageClassification", "Swinv2Config", **_WINDOWS),
    _vision("TimesformerForVideoClassification", "TimesformerConfig", **_PATCHES, num_frames=2),
    _vision("UperNetForSemanticSegmentation", "UperNetConfig", backbone_config={
        "model_type": "convnext", **_STAGES, "out_features": ["stage1", "stage2", "stage3", "stage4"]},
        hidden_size=16, auxiliary_in_channels=16, auxiliary_channels=8, pool_scales=[1, 2]),
    _vision("ViTForImageClassification", "ViTConfig", **_PATCHES),
    _vision("ViTMAEForPreTraining", "ViTMAEConfig", **_PATCHES, decoder_hidden_size=16,
            decoder_num_hidden_layers=1, decoder_num_attention_heads=2, decoder_intermediate_size=32),
    _vision("ViTMSNForImageClassification", "ViTMSNConfig", **_PATCHES),
    _vision("VideoMAEForVideoClassification", "VideoMAEConfig", **_PATCHES, num_frames=4),
    _vision("VivitForVideoClassification", "VivitConfig", **_BODY, image_size=32, num_frames=4,
            tubelet_size=[2, 8, 8]),
    _vision("YolosForObjectDetection", "YolosConfig", **_BODY, image_size=[32, 48], patch_size=8,
            num_detection_tokens=5),
)  # fmt: skip

_SOUNDS: Final = (
    _audio("ASTForAudioClassification", "ASTConfig", **_BODY, patch_size=8, num_mel_bins=16, max_length=64,
           frequency_stride=8, time_stride=8),
    _audio("Data2VecAudioForCTC", "Data2VecAudioConfig", **{**_SPEECH, "num_conv_pos_embeddings": 2},
           conv_pos_kernel_size=3),
    _audio("EncodecModel", "EncodecConfig", num_filters=4, hidden_size=16, codebook_size=16, codebook_dim=16,
           upsampling_ratios=[4, 2], target_bandwidths=[24.0], sampling_rate=8000),
    _audio("HubertForCTC", "HubertConfig", **_SPEECH),
    _audio("MoonshineForConditionalGeneration", "MoonshineConfig", **_TOKENS, **_SPECIAL, hidden_size=32,
           intermediate_size=64, encoder_num_hidden_layers=1, decoder_num_hidden_layers=1,
           encoder_num_attention_heads=4, decoder_num_attention_heads=4, decoder_start_token_id=1),
    _audio("SEWForCTC", "SEWConfig", **_SPEECH, squeeze_factor=2),
    _audio("Speech2TextForConditionalGeneration", "Speech2TextConfig", **_SEQ2SEQ, conv_channels=16,
           input_feat_per_channel=16, max_source_positions=64, max_target_positions=64),
    _audio("UniSpeechForCTC", "UniSpeechConfig", **_SPEECH),
    _audio("UnivNetModel", "UnivNetConfig", model_hidden_channels=8, num_mel_bins=16),
    _audio("Wav2Vec2ForCTC", "Wav2Vec2Config", **_SPEECH),
    _audio("Wav2Vec2BertForCTC", "Wav2Vec2BertConfig", **_BODY, vocab_size=32,
           feature_projection_input_dim=32),
    _audio("Wav2Vec2ConformerForCTC", "Wav2Vec2ConformerConfig", **_SPEECH),
    _audio("WavLMForCTC", "WavLMConfig", **_SPEECH),
    _audio("WhisperForConditionalGeneration", "WhisperConfig",
           **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"}, num_mel_bins=16,
           max_source_positions=32, max_target_positions=32),
    _audio("WhisperForAudioClassification", "WhisperConfig",
           **{k: v for k, v in _SEQ2SEQ.items() if k != "max_position_embeddings"}, num_mel_bins=16,
           max_source_positions=32, max_target_positions=32),
)  # fmt: skip

_MIXED: Final = (
    _several("BlipForConditionalGeneration", "BlipConfig", **_CLIP),
    _several("Blip2ForConditionalGeneration", "Blip2Config", vision_config=_PATCHES, qformer_config={
        **_TEXT, "encoder_hidden_size": 32}, text_config={
        "model_type": "opt", **_TOKENS, **_SPECIAL, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "ffn_dim": 64, "word_embed_proj_dim": 32}, num_query_tokens=4,
        image_text_hidden_size=16, image_token_index=98),
    _several("CLIPModel", "CLIPConfig", **_CLIP),
    _several("CLIPSegForImageSegmentation", "CLIPSegConfig", **_CLIP, reduce_dim=16, extract_layers=[0, 1],
             decoder_num_attention_heads=2, decoder_intermediate_size=32),
    _several("ClapModel", "ClapConfig", text_config={**_TEXT, "projection_dim": 16}, audio_config={
        "spec_size": 64, "window_size": 4, "num_mel_bins": 16, "patch_embeds_hidden_size": 16,
        "depths": [1, 1], "num_attention_heads": [2, 4], "hidden_size": 32, "projection_dim": 16,
        "patch_stride": [4, 4]}, projection_dim=16),
    _several("GitForCausalLM", "GitConfig", **_TEXT, **_SPECIAL, vision_config=_PATCHES),
    _several("LlavaForConditionalGeneration", "LlavaConfig", vision_config={
        "model_type": "clip_vision_model", **_PATCHES}, text_config={"model_type": "llama", **_DECODER},
        image_token_id=98),
    _several("LxmertModel", "LxmertConfig", **_TEXT, l_layers=1, x_layers=1, r_layers=1, visual_feat_dim=16),
    _several("OwlViTForObjectDetection", "OwlViTConfig", **{**_CLIP, "projection_dim": 32}),
    _several("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", vision_config={
        "model_type": "siglip_vision_model", **_PATCHES, "vision_use_head": False}, text_config={
        "model_type": "gemma", **_DECODER, "head_dim": 8}, image_token_id=98, projection_dim=32),
    _several("SiglipModel", "SiglipConfig", text_config={**_TEXT, **_SPECIAL, "projection_size": 32},
             vision_config=_PATCHES),
    _several("VisualBertModel", "VisualBertConfig", **_TEXT, visual_embedding_dim=16),
    _several("ViltForQuestionAnswering", "ViltConfig", **_PATCHES, **_TOKENS),
    _several("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig",
             encoder={"model_type": "vit", **_PATCHES},
             decoder={"model_type": "gpt2", **_GPT, "add_cross_attention": True, "is_decoder": True},
             decoder_start_token_id=1, pad_token_id=0),
)  # fmt: skip

NETWORKS: Final = (*_ENCODERS, *_DECODERS, *_ENCODER_DECODERS, *_IMAGES, *_SOUNDS, *_MIXED)
"""All of them, sorted by kind."""
