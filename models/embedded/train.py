"""Train an embedded pipeline: `python -m models.embedded.train dit`.

Recipe of the DiT: the digits as 64x64 pictures; an autoencoder (8x smaller, 4 channels) by mean
squared and absolute error; a DiT (Peebles and Xie, 2023, with its adaLN-Zero initialisation) on
the latents by noise prediction, linear betas, 10 % of the labels dropped, an exponential moving
average of the weights. Measured results stand in the README beside each pipeline.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from tqdm import tqdm

from models.embedded.classifier import save_classifier, train_classifier
from models.embedded.digits import draw, load_scans
from quant.storage import atomic_write, load_checkpoint

NULL_CLASS = 1000  # DiTPipeline's own class for "no label"
LABEL_DROP = 0.1
CHECKPOINT_STEPS = 250


def build_vae():
    widths = (8, 16, 32, 32)
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=64,
    )


def build_dit():
    """DiT-XL/2's 28 blocks and layer names at width 36, its conditioning shared by all blocks."""
    denoiser = DiTTransformer2DModel(
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=4,
        out_channels=8,
        num_layers=28,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=NULL_CLASS,
    )
    blocks = denoiser.transformer_blocks
    for block in blocks:
        block.norm1.emb = blocks[0].norm1.emb  # one timestep and label embedder, as in DiT
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    embedder = blocks[0].norm1.emb
    embedder.class_embedder.dropout_prob = 0  # else every block drops labels on its own
    for layer in (embedder.timestep_embedder.linear_1, embedder.timestep_embedder.linear_2):
        torch.nn.init.normal_(layer.weight, std=0.02)
    table = embedder.class_embedder.embedding_table.weight.data
    table.normal_(std=0.02)
    table[10:NULL_CLASS] = 0  # classes that the digits do not use
    # Only the noise half starts at zero: a zero variance half would give all-zero channels.
    noise_rows = torch.arange(denoiser.proj_out_2.out_features) % 8 < 4
    denoiser.proj_out_2.weight.data[noise_rows] = 0
    return denoiser


def unshare(denoiser):
    """A copy of the denoiser whose blocks each own the conditioning weights, as diffusers loads them."""
    denoiser = copy.deepcopy(denoiser)
    for block in denoiser.transformer_blocks:
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    return denoiser


def train_vae(device, steps, batch_size=48):
    """The autoencoder, its scaling factor set from the spread of the latents."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    scans = load_scans()[0].to(device)
    for _ in (progress := tqdm(range(steps), desc="autoencoder", mininterval=5)):
        pick = torch.randint(len(scans), (batch_size,), generator=generator).to(device)
        pictures = draw(scans[pick], generator) * 2 - 1
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        reconstruction = F.mse_loss(decoded, pictures) + 0.5 * F.l1_loss(decoded, pictures)
        loss = reconstruction + 2e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    vae.eval()
    latents, _ = encode_digits(vae, placements=2)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


@torch.no_grad()
def encode_digits(vae, placements):
    """Latents [1797 x placements, 4, 8, 8] of the digits, each placed at random, and their labels."""
    generator = torch.Generator().manual_seed(1)
    scans, labels = load_scans()
    batches = scans.repeat(placements, 1, 1, 1).split(512)
    pictures = (draw(batch, generator).to(vae.device) * 2 - 1 for batch in batches)
    return torch.cat([vae.encode(batch).latent_dist.mean for batch in pictures]), labels.repeat(placements)


@torch.no_grad()
def vae_psnr(vae):
    """Peak signal-to-noise ratio in dB of real digits through the autoencoder."""
    pictures = draw(load_scans("test")[0], torch.Generator().manual_seed(2)).to(vae.device)
    decoded = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    return -10 * torch.log10(F.mse_loss(decoded.clamp(0, 1), pictures)).item()


def train_dit(vae, steps, batch_size, lr, ema_decay, checkpoint):
    """The denoiser's averaged weights after `steps` of noise prediction, and the running loss.

    The file `checkpoint` is kept up to date; a training that was cut off goes on from it.
    """
    torch.manual_seed(0)
    device = vae.device
    latents, labels = encode_digits(vae, placements=48)
    latents, labels = latents * vae.config.scaling_factor, labels.to(device)
    alphas = noise_scheduler().alphas_cumprod.to(device)
    denoiser = build_dit().to(device)
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    parameters, averages = list(denoiser.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=steps, pct_start=0.03, final_div_factor=100
    )
    stateful = {"denoiser": denoiser, "average": average, "optimizer": optimizer, "schedule": schedule}
    first, running = resume_training(checkpoint, stateful, device)
    for step in (progress := tqdm(range(first, steps), initial=first, total=steps, desc="denoiser", mininterval=5)):
        pick = torch.randint(len(latents), (batch_size,), device=device)
        clean, label = latents[pick], labels[pick]  # [B, 4, 8, 8], [B]
        label = torch.where(torch.rand(batch_size, device=device) < LABEL_DROP, NULL_CLASS, label)
        timestep = torch.randint(len(alphas), (batch_size,), device=device)
        alpha = alphas[timestep].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        output = denoiser(noisy, timestep=timestep, class_labels=label).sample  # [B, 8, 8, 8]
        loss = F.mse_loss(output[:, :4], noise)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(averages, parameters, 1 - min(ema_decay, (step + 1) / (step + 10)))
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        progress.set_postfix(loss=f"{running:.4f}", refresh=False)
        if (step + 1) % CHECKPOINT_STEPS == 0:
            save_training(checkpoint, stateful, device, step + 1, running)
    checkpoint.unlink(missing_ok=True)
    return unshare(average), running


def save_training(checkpoint, stateful, device, step, loss):
    states = {name: thing.state_dict() for name, thing in stateful.items()}
    with atomic_write(checkpoint) as file:
        torch.save(states | {"random": random_module(device).get_rng_state(), "step": step, "loss": loss}, file)


def resume_training(checkpoint, stateful, device):
    """Bring everything to where the checkpoint stands, if there is one: (steps done, running loss)."""
    if not checkpoint.exists():
        return 0, None
    states = load_checkpoint(checkpoint)
    for name, thing in stateful.items():
        thing.load_state_dict(states[name])
    random_module(device).set_rng_state(states["random"])
    return states["step"], states["loss"]


def random_module(device):
    """The module whose random state the device draws from."""
    return torch.cuda if device.type == "cuda" else torch


def noise_scheduler():
    return DDIMScheduler(beta_schedule="linear", clip_sample=False)


def save_pipeline(denoiser, vae, folder):
    """Write a DiTPipeline in half precision, as the real one is run."""
    pipeline = DiTPipeline(transformer=denoiser.cpu(), vae=vae.cpu(), scheduler=noise_scheduler())
    pipeline.to(torch.float16).save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=["dit"])
    parser.add_argument("--steps", type=int, default=10_000, help="training steps of the denoiser")
    parser.add_argument("--vae_steps", type=int, default=1_500, help="training steps of the autoencoder")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--outdir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True

    classifier_folder, family_folder = args.outdir / "digit_classifier", args.outdir / args.family
    if not classifier_folder.exists():
        classifier, accuracy = train_classifier(device)
        save_classifier(classifier, classifier_folder)
        print(f"classifier: {accuracy:.2%} of held-out real digits right")
    if (family_folder / "vae").exists():
        vae = AutoencoderKL.from_pretrained(family_folder / "vae").to(device)
    else:
        vae = train_vae(device, args.vae_steps)
        vae.save_pretrained(family_folder / "vae")
    print(f"autoencoder: {vae_psnr(vae):.1f} dB on real digits")
    checkpoint = args.outdir / f"{args.family}.training.pt"
    denoiser, loss = train_dit(vae, args.steps, args.batch_size, args.lr, args.ema_decay, checkpoint)
    print(f"denoiser: loss {loss:.4f}")
    save_pipeline(denoiser, vae, family_folder)


if __name__ == "__main__":
    main()
