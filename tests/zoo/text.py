"""Small text encoders and tokenizers in the classes that pipelines of today name, made without a network.

The tokenizers know letters and bytes alone, but for T5's and CLIP's, which are the embedded models'. The encoders' widths
differ pairwise, as those of the real ones do, and their weights are random.
"""

import torch
import transformers

from models.embedded.text_encoders import byte_alphabet, clip_tokenizer, t5_encoder, t5_tokenizer

CLIP_WIDTH, CLIP_2_WIDTH, T5_WIDTH, UMT5_WIDTH, QWEN_WIDTH, GEMMA_WIDTH = 16, 24, 48, 40, 32, 28
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2}
CHAT = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


def t5():
    """(tokenizer, T5 encoder), as the embedded models have them, T5_WIDTH wide."""
    tokenizer = t5_tokenizer()
    return tokenizer, seeded(t5_encoder(tokenizer))


def umt5():
    """(T5's tokenizer, UMT5 encoder), whose every layer has a relative position bias of its own."""
    tokenizer = t5_tokenizer()
    sizes = {"d_model": UMT5_WIDTH, "d_kv": 8, "d_ff": 2 * UMT5_WIDTH, "num_layers": 2, "num_heads": 2}
    config = transformers.UMT5Config(vocab_size=len(tokenizer), feed_forward_proj="gated-gelu", dropout_rate=0.0, **sizes)
    return tokenizer, seeded(transformers.UMT5EncoderModel(config))


def clip():
    """(tokenizer, CLIP text model), whose pooled output is CLIP_WIDTH wide."""
    tokenizer = clip_tokenizer()
    return tokenizer, seeded(transformers.CLIPTextModel(_clip_config(tokenizer, CLIP_WIDTH)))


def clip_with_projection(width):
    """(tokenizer, CLIP text model with a projection), both its outputs `width` wide."""
    tokenizer = clip_tokenizer()
    return tokenizer, seeded(transformers.CLIPTextModelWithProjection(_clip_config(tokenizer, width)))


def _clip_config(tokenizer, width):
    return transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,  # Stable Diffusion 3 reads the last but one
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def qwen3():
    """(Qwen tokenizer, Qwen 3 model), as Z-Image has them."""
    tokenizer = qwen_tokenizer()
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=QWEN_WIDTH, intermediate_size=48, head_dim=16, **HEADS
    )
    return tokenizer, seeded(transformers.Qwen3Model(config))


def qwen2_5_vl():
    """(Qwen tokenizer, Qwen 2.5 model of texts and pictures), as Qwen-Image has them."""
    tokenizer = qwen_tokenizer()
    rotary = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 1e6}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    text = HEADS | {"hidden_size": QWEN_WIDTH, "intermediate_size": 48, "rope_parameters": rotary} | ends
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": QWEN_WIDTH}
    config = transformers.Qwen2_5_VLConfig(text_config=text | {"vocab_size": len(tokenizer)}, vision_config=vision)
    return tokenizer, seeded(transformers.Qwen2_5_VLForConditionalGeneration(config))


def gemma2():
    """(Gemma tokenizer, Gemma 2 model), as Sana has them."""
    tokenizer = gemma_tokenizer()
    config = transformers.Gemma2Config(
        vocab_size=len(tokenizer), hidden_size=GEMMA_WIDTH, intermediate_size=48, head_dim=8, **HEADS
    )
    return tokenizer, seeded(transformers.Gemma2Model(config))


def qwen_tokenizer():
    """Bytes alone, and the marks of a conversation."""
    vocabulary = _numbered([*byte_alphabet(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    marks = ["<|im_start|>", "<|im_end|>"]
    return transformers.Qwen2Tokenizer(
        vocab=vocabulary, merges=[], additional_special_tokens=marks, chat_template=CHAT, model_max_length=512
    )


def gemma_tokenizer():
    """Letters; any other character as bytes."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    vocabulary = _numbered([*special, "▁", *letters, *(f"<0x{byte:02X}>" for byte in range(256))])
    return transformers.GemmaTokenizer(vocab=vocabulary, merges=[], model_max_length=512)


def _numbered(pieces):
    return {piece: number for number, piece in enumerate(pieces)}


def seeded(module):
    """The module for inference, its parameters filled with random values of seed 0, none of them all zero or one.

    Matrices get a variance of 1 over their inputs, vectors small values around 0 (biases) or 1 (scales).
    """
    generator = torch.Generator().manual_seed(0)
    for name, parameter in module.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            parameter.data = 0.1 * noise + ("bias" not in name)
    return module.eval().requires_grad_(False)
