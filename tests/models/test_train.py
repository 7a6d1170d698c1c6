import pytest
import torch

from models.embedded import train
from models.embedded.digits import draw, load_scans


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = train.build_vae().eval()
    vae.register_to_config(scaling_factor=1.0)
    return vae


def test_interrupted_training_goes_on_exactly(vae, tmp_path, monkeypatch):
    """Training cut off and started again ends with the weights of an undisturbed one."""
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 2)
    scans, labels = load_scans()
    monkeypatch.setattr(train, "load_scans", lambda split="all": (scans[:20], labels[:20]))
    settings = {"steps": 4, "batch_size": 2, "lr": 1e-3, "ema_decay": 0.9, "checkpoint": tmp_path / "t.pt"}
    whole, _ = train.train_dit(vae, **settings)

    def cut(*args):
        save(*args)
        raise KeyboardInterrupt

    save = train.save_training
    monkeypatch.setattr(train, "save_training", cut)
    with pytest.raises(KeyboardInterrupt):
        train.train_dit(vae, **settings)
    monkeypatch.setattr(train, "save_training", save)
    resumed, _ = train.train_dit(vae, **settings)
    assert not (tmp_path / "t.pt").exists()
    for (name, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_the_denoiser_starts_as_adaln_zero():
    """Every block starts as the identity, and the output depends on neither label nor time."""
    denoiser = train.build_dit().eval()
    hidden = torch.randn(2, 16, 36)
    with torch.no_grad():
        out = denoiser.transformer_blocks[5](hidden, timestep=torch.tensor([1, 9]), class_labels=torch.tensor([3, 1000]))
    assert torch.equal(out, hidden)
    rows = train.unshare(denoiser).proj_out_2.weight.view(4, 8, 36)  # [patch pixels, channels, width]
    assert (rows[:, :4] == 0).all() and not (rows[:, 4:] == 0).all(dim=2).any()


def test_digits_have_a_margin():
    pictures = draw(load_scans("test")[0], torch.Generator().manual_seed(0))
    assert pictures.shape[1:] == (3, 64, 64) and pictures.min() >= 0 and pictures.max() <= 1
    ink = pictures.mean(1) < 0.5
    assert not ink[:, :2].any() and not ink[:, -2:].any() and ink[:, 16:48, 16:48].flatten(1).any(1).all()
    assert torch.equal(pictures, draw(load_scans("test")[0], torch.Generator().manual_seed(0)))
