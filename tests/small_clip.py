"""A CLIP model of a few weights, and pairs of images and prompts for it."""

import numpy as np
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from models.embedded.text_encoders import clip_tokenizer

PIXELS, TOKENS = 32, 16  # fewer tokens than the tokenizer's own limit of 77
PROMPTS = ["a red 3", "blue seven, white background", "a handwritten two, black on green " * 9, "", "zebra", "9"]


def tiny_clip(tokenizer):
    """A CLIPModel with weights large enough that pairs differ and some cosines are below zero."""
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**small, **special, "vocab_size": len(tokenizer), "max_position_embeddings": TOKENS}
    vision = {**small, "image_size": PIXELS, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def save_clip(folder):
    """Write a tiny CLIP model and its processor."""
    tokenizer = clip_tokenizer()
    size = {"height": PIXELS, "width": PIXELS}
    tiny_clip(tokenizer).save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": PIXELS}, crop_size=size), tokenizer).save_pretrained(folder)
    return folder


def random_images():
    """A list of uint8 [PIXELS, PIXELS, 3], one for each of PROMPTS."""
    shape = (len(PROMPTS), PIXELS, PIXELS, 3)
    return list(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
