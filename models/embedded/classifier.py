"""The classifier that judges the embedded models: digit, ink, paper and 64 features of a picture.

It stands in for the Inception network, which knows nothing of digits, wherever FID is computed.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from models.embedded.digits import INKS_ON_PAPERS, PALETTE, draw, load_scans, random_pairs

FOLDER = Path(__file__).parent / "digit_classifier"
NUM_FEATURES = 64


class DigitClassifier(nn.Module):
    """A small convolutional network: pictures [N, 3, H, W] in 0..1 to logits of digit, ink and paper."""

    def __init__(self):
        super().__init__()
        widths = (3, 24, 40, 56, NUM_FEATURES)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.heads = nn.ModuleList(nn.Linear(NUM_FEATURES, size) for size in (10, len(PALETTE), len(PALETTE)))

    def features(self, pictures):
        """Features [N, 64]: the last convolution's channels, averaged over the picture."""
        hidden = 2 * pictures - 1  # [N, 3, H, W]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden = F.gelu(norm(conv(hidden)))
        return hidden.mean(dim=(2, 3))

    def forward(self, pictures):
        """Logits of digit [N, 10], ink [N, 6] and paper [N, 6]."""
        features = self.features(pictures)
        return [head(features) for head in self.heads]


def load_classifier(device="cpu"):
    """The trained classifier in evaluation mode."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return classifier.eval().requires_grad_(False).to(device)


@torch.no_grad()
def classify(classifier, pictures):
    """Digit, ink and paper [N, 3] of uint8 pictures [N, H, W, 3]; the colours as places in the palette."""
    device = next(classifier.parameters()).device
    batches = torch.from_numpy(pictures).permute(0, 3, 1, 2).split(256)
    return torch.cat([answers(classifier, batch.to(device).float() / 255).cpu() for batch in batches])


def answers(classifier, pictures):
    return torch.stack([logits.argmax(1) for logits in classifier(pictures)], dim=1)


def colored_digits(scans, labels, generator):
    """Pictures of the scans in random colours, and what they show: digit, ink and paper [N, 3]."""
    pairs = random_pairs(len(scans), generator)
    colors = torch.tensor(INKS_ON_PAPERS)[pairs].to(labels.device)  # [N, 2]
    return draw(scans, pairs, generator), torch.cat([labels[:, None], colors], dim=1)


def train_classifier(device, steps=4000, batch_size=128):
    """Train on four fifths of the real digits; returns the classifier and its accuracy on the rest."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    classifier = DigitClassifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    scans, labels = (tensor.to(device) for tensor in load_scans("train"))
    for _ in range(steps):
        pick = torch.randint(len(scans), (batch_size,), generator=generator).to(device)
        pictures, shown = colored_digits(scans[pick], labels[pick], generator)
        pictures = pictures + 0.03 * torch.randn_like(pictures)  # generated pictures are not as clean as drawn ones
        losses = [
            F.cross_entropy(logits, answer, label_smoothing=0.05)
            for logits, answer in zip(classifier(pictures), shown.T, strict=True)
        ]
        optimizer.zero_grad()
        sum(losses).backward()
        optimizer.step()
        schedule.step()
    return classifier.eval(), held_out_accuracy(classifier)


@torch.no_grad()
def held_out_accuracy(classifier):
    """Shares of the held-out real digits of which digit, ink and paper are told right, each share by itself."""
    pictures, shown = colored_digits(*load_scans("test"), torch.Generator().manual_seed(1))
    device = next(classifier.parameters()).device
    return (answers(classifier, pictures.to(device)).cpu() == shown).float().mean(0).tolist()


def save_classifier(classifier, folder=FOLDER):
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().cpu() for name, value in classifier.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
