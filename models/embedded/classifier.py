"""The digit classifier that judges the embedded models: class and 64 features of a picture.

It stands in for the Inception network, which knows nothing of digits, wherever FID is computed.
"""

import itertools
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from models.embedded.digits import draw, load_scans

FOLDER = Path(__file__).parent / "digit_classifier"
NUM_FEATURES = 64


class DigitClassifier(nn.Module):
    """A small convolutional network: pictures [N, 3, H, W] in 0..1 to logits [N, 10]."""

    def __init__(self):
        super().__init__()
        widths = (1, 16, 32, 48, NUM_FEATURES)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=2, padding=1) for a, b in itertools.pairwise(widths))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in widths[1:])
        self.head = nn.Linear(NUM_FEATURES, 10)

    def features(self, pictures):
        """Features [N, 64]: the last convolution's channels, averaged over the picture."""
        hidden = 1 - pictures.mean(dim=1, keepdim=True)  # [N, 1, H, W], ink is high
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden = F.gelu(norm(conv(hidden)))
        return hidden.mean(dim=(2, 3))

    def forward(self, pictures):
        return self.head(self.features(pictures))


def load_classifier(device="cpu"):
    """The trained classifier in evaluation mode."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(FOLDER / "model.safetensors"))
    return classifier.eval().requires_grad_(False).to(device)


@torch.no_grad()
def classify(classifier, pictures):
    """Classes [N] of uint8 pictures [N, H, W, 3]."""
    device = next(classifier.parameters()).device
    batches = torch.from_numpy(pictures).permute(0, 3, 1, 2).split(256)
    return torch.cat([classifier(batch.to(device).float() / 255).argmax(1).cpu() for batch in batches])


def train_classifier(device, steps=1500, batch_size=128):
    """Train on four fifths of the real digits; returns the classifier and its accuracy on the rest."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    classifier = DigitClassifier().to(device)
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    scans, labels = (tensor.to(device) for tensor in load_scans("train"))
    for _ in range(steps):
        pick = torch.randint(len(scans), (batch_size,), generator=generator).to(device)
        logits = classifier(draw(scans[pick], generator))
        loss = F.cross_entropy(logits, labels[pick], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return classifier.eval(), held_out_accuracy(classifier)


@torch.no_grad()
def held_out_accuracy(classifier):
    """Share of the held-out real digits, each placed at random, that are classified as their label."""
    scans, labels = load_scans("test")
    device = next(classifier.parameters()).device
    logits = classifier(draw(scans, torch.Generator().manual_seed(1)).to(device))
    return (logits.argmax(1).cpu() == labels).float().mean().item()


def save_classifier(classifier, folder=FOLDER):
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: value.contiguous().cpu() for name, value in classifier.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
