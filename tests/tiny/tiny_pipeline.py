"""A whole SanaPipeline of tiny random parts on disk: transformer, scheduler, VAE, text encoder and tokenizer."""

from pathlib import Path

import torch

WORDS = (
    "a",
    "bear",
    "riding",
    "skateboard",
    "red",
    "cat",
    "on",
    "the",
    "moon",
    "photo",
    "of",
    "an",
    "old",
    "dawn",
    "rain",
)
CHANNELS, WIDTH, LATENT_SIDE = 4, 16, 4
"""Channels and side of the latents, width of the text encoder."""


def make_pipeline(folder: Path, seed: int = 0) -> Path:
    """Write the pipeline and return its folder."""
    from diffusers import AutoencoderDC, DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import Gemma2Config, Gemma2Model, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<eos>", "<bos>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, padding_side="right", **special)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text_encoder = Gemma2Model(
            Gemma2Config(
                vocab_size=len(vocabulary), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1,
                num_attention_heads=2, num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8,
                attn_implementation="eager", pad_token_id=0, eos_token_id=1, bos_token_id=2,
            )
        )  # fmt: skip
        blocks = ("ResBlock",) * 2
        vae = AutoencoderDC(
            latent_channels=CHANNELS, attention_head_dim=4, encoder_block_types=blocks, decoder_block_types=blocks,
            encoder_block_out_channels=(4, 4), decoder_block_out_channels=(4, 4), encoder_layers_per_block=(1, 1),
            decoder_layers_per_block=(1, 1), encoder_qkv_multiscales=((), ()), decoder_qkv_multiscales=((), ()),
            downsample_block_type="conv", upsample_block_type="interpolate", decoder_norm_types="rms_norm",
            decoder_act_fns="silu", scaling_factor=0.41407,
        )  # fmt: skip
        transformer = SanaTransformer2DModel(
            in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, num_attention_heads=4, attention_head_dim=4,
            num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH,
            sample_size=LATENT_SIDE, patch_size=1,
        )  # fmt: skip
    scheduler = DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++", flow_shift=3.0, prediction_type="flow_prediction", use_flow_sigmas=True
    )
    pipeline = SanaPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
    pipeline.save_pretrained(folder)
    return folder


def write_prompts(path: Path, count: int = 12) -> Path:
    """A prompt file of the released layout with broken lines in it."""
    lines = [f"{i}.jpg\t{WORDS[i % 7]} {WORDS[7 + i % 5]} {' '.join(WORDS[: i % 4])}\t5.{i}\tx" for i in range(count)]
    lines[3:3] = ["no columns at all", "x.jpg\tprompt\tnot a score\tx", ""]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path
