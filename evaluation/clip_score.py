"""CLIP score (Hessel et al., 2021): how well images show what their prompts say, by CLIP (Radford et al., 2021)."""

import itertools

import numpy as np
import torch


class ClipScore:
    """Scores image-prompt pairs with a CLIPModel, as transformers has it, and its processor."""

    def __init__(self, model, processor, device):
        self.model, self.processor = model.eval().to(device), processor

    def scores(self, images, prompts, batch_size=64):
        """100 x max(cosine, 0) of each image (uint8 [H, W, 3]) and its prompt: [N], equation 1 with w = 100.

        Prompts are cut to the model's maximum. ValueError if there are more of one than of the other.
        """
        pairs, scores = zip(images, prompts, strict=True), []
        while batch := list(itertools.islice(pairs, batch_size)):
            scores += self._cosines(*zip(*batch, strict=True)).clamp(min=0).tolist()
        return 100 * np.array(scores, dtype=np.float64)

    @torch.no_grad()
    def _cosines(self, images, prompts):
        inputs = self.processor(
            images=list(images),
            text=list(prompts),
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        )
        output = self.model(**inputs.to(self.model.device))
        return (output.image_embeds * output.text_embeds).sum(-1)  # both of length one: [B]
