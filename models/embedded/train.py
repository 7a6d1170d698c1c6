"""Train an embedded pipeline: `python -m models.embedded.train pixart_alpha`.

Coloured digits with captions as 64x64 pictures; one autoencoder (8 times smaller, 4 channels) by mean
squared and absolute error and one set of text encoders for all; each denoiser on the latents by noise
(or velocity) prediction, 10 % of the captions dropped, an exponential moving average of the weights.
What stands in the folder already is used and not made anew. A training that was cut off goes on when
started again. On a GPU a step runs as one CUDA graph: these models are deep and narrow, and else wait
for their kernels to be launched.
"""

import argparse
import copy
import inspect
import itertools
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDPMScheduler
from tqdm import tqdm

from models.embedded.captions import NUM_PHRASINGS, NUM_SUBJECTS, all_captions, digit_and_colors, subject_of
from models.embedded.classifier import save_classifier, train_classifier
from models.embedded.denoisers import RECIPES, assemble, build_vae
from models.embedded.digits import draw, load_scans, random_pairs
from models.embedded.text_encoders import load_text_encoder, train_text_encoder
from models.inputs import prompt_argument
from models.listening import first_call
from quant.files import load_checkpoint, save_checkpoint

CAPTION_DROP = 0.1
CHECKPOINT_STEPS = 250
WARM_UP_SHARE = 0.03


def train_vae(device, steps, batch_size=64):
    """The autoencoder, its scaling factor set from the spread of the latents."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    vae = build_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.05)
    scans = load_scans()[0].to(device)
    for _ in (progress := tqdm(range(steps), desc="autoencoder", mininterval=5)):
        pick = torch.randint(len(scans), (batch_size,), generator=generator).to(device)
        pictures = draw(scans[pick], random_pairs(batch_size, generator), generator) * 2 - 1
        posterior = vae.encode(pictures).latent_dist
        decoded = vae.decode(posterior.sample()).sample
        reconstruction = F.mse_loss(decoded, pictures) + 0.5 * F.l1_loss(decoded, pictures)
        loss = reconstruction + 1e-3 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    vae.eval()
    latents, _ = encode_digits(vae, count=4096)
    vae.register_to_config(scaling_factor=1 / latents.std().item())
    return vae


@torch.no_grad()
def encode_digits(vae, count):
    """Latents [count, 4, 8, 8] of digits placed and coloured at random, and their subjects [count]."""
    generator = torch.Generator().manual_seed(1)
    scans, labels = load_scans()
    pick = torch.randint(len(scans), (count,), generator=generator)
    pairs = random_pairs(count, generator)
    batches = zip(scans[pick].split(512), pairs.split(512), strict=True)
    pictures = (draw(some.to(vae.device), colors, generator) * 2 - 1 for some, colors in batches)
    latents = torch.cat([vae.encode(batch).latent_dist.mean for batch in pictures])
    return latents, subject_of(labels[pick], pairs).to(vae.device)


@torch.no_grad()
def vae_psnr(vae):
    """Peak signal-to-noise ratio in dB of real digits through the autoencoder."""
    generator = torch.Generator().manual_seed(2)
    scans = load_scans("test")[0]
    pictures = draw(scans, random_pairs(len(scans), generator), generator).to(vae.device)
    decoded = vae.decode(vae.encode(pictures * 2 - 1).latent_dist.mean).sample / 2 + 0.5
    return -10 * torch.log10(F.mse_loss(decoded.clamp(0, 1), pictures)).item()


def conditions_of(pipeline, recipe, batch_size=100):
    """What the pipeline gives its denoiser for every caption, and for none.

    Returns two dictionaries of the denoiser's arguments (names of nested ones joined by a dot): tensors
    [3601, ...] with a row per caption and a last one for the unguided half; and what is the same for all.
    """
    prompts = captions_for(pipeline)
    batches = [arguments_for(pipeline, recipe, prompts[at : at + batch_size]) for at in range(0, len(prompts), batch_size)]
    own = arguments_for(pipeline, recipe, prompts[:1])
    both = arguments_for(pipeline, recipe, prompts[:1], guidance_scale=2.0)
    rows = len(prompts[:batch_size])
    varied = [name for name, value in batches[0].items() if isinstance(value, torch.Tensor) and len(value) == rows]
    table = {name: torch.cat([*(batch[name] for batch in batches), unguided_row(own[name], both[name])]) for name in varied}
    return drop_masked_tokens(table), {name: value for name, value in own.items() if name not in table}


def captions_for(pipeline):
    """Named prompts of all captions; for a class-conditional pipeline the digits they are of."""
    captions = all_captions()
    if prompt_argument(pipeline) == "class_labels":
        return [digit_and_colors(place // NUM_PHRASINGS)[0] for place in range(len(captions))]
    return captions


def arguments_for(pipeline, recipe, prompts, guidance_scale=1.0):
    """The denoiser's arguments for the prompts, but for the noisy latents and the timestep."""
    denoiser = getattr(pipeline, recipe.denoiser_name)
    call = {prompt_argument(pipeline): prompts, "guidance_scale": guidance_scale, "num_inference_steps": 1}
    taken = first_call(pipeline, denoiser, **call, **dict(recipe.call))
    noisy_latents = list(inspect.signature(type(denoiser).forward).parameters)[1]
    others = {name: value for name, value in taken.items() if name not in (noisy_latents, "timestep", "return_dict")}
    return flatten(others)


def unguided_row(own, both):
    """Of the two rows of a guided call's argument the one [1, ...] that is not the prompt's own."""
    first, second = both.split(1)
    return second if torch.equal(first, own) else first


def flatten(arguments):
    """Nested dictionaries as one, names joined by a dot."""
    flat = {}
    for name, value in arguments.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": item for inner, item in flatten(value).items()}
        else:
            flat[name] = value
    return flat


def unflatten(flat):
    arguments = {}
    for name, value in flat.items():
        *outer, last = name.split(".")
        place = arguments
        for part in outer:
            place = place.setdefault(part, {})
        place[last] = value
    return arguments


def drop_masked_tokens(table):
    """Leave out the tokens that are masked for every caption: attention does not see them."""
    mask = table.get("encoder_attention_mask")
    if mask is None:
        return table
    longest = int(mask.sum(1).max())
    return table | {name: table[name][:, :longest] for name in ("encoder_hidden_states", "encoder_attention_mask")}


class Training:
    """A denoiser in training: one step of it, and everything that a checkpoint holds."""

    def __init__(self, pipeline, recipe, data, args):
        self.denoiser = getattr(pipeline, recipe.denoiser_name).requires_grad_(True).train()
        self.device = self.denoiser.device
        self.latents, self.subjects = data  # [N, 4, 8, 8], [N]
        self.table, self.fixed = conditions_of(pipeline, recipe)
        self.alphas = DDPMScheduler.from_config(pipeline.scheduler.config).alphas_cumprod.to(self.device)
        self.velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
        self.max_timestep, self.args = recipe.max_timestep, args
        self.average = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.parameters = list(self.denoiser.parameters())
        self.averages = list(self.average.parameters())
        self.lr = torch.zeros((), device=self.device)
        graphed = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(self.parameters, lr=self.lr, weight_decay=0, capturable=graphed)
        self.running_loss = torch.zeros((), device=self.device)

    def step(self):
        """One step of noise prediction; only device work, so that it can be recorded as a CUDA graph."""
        count = self.args.batch_size
        pick = torch.randint(len(self.latents), (count,), device=self.device)
        clean, place = self.latents[pick], self.subjects[pick] * NUM_PHRASINGS  # [B, 4, 8, 8], [B]
        place = place + torch.randint(NUM_PHRASINGS, (count,), device=self.device)
        dropped = torch.rand(count, device=self.device) < CAPTION_DROP
        place = torch.where(dropped, NUM_SUBJECTS * NUM_PHRASINGS, place)  # the last row
        timestep = torch.randint(self.max_timestep, (count,), device=self.device)
        alpha = self.alphas[timestep].view(-1, 1, 1, 1)
        noise = torch.randn_like(clean)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean if self.velocity else noise
        condition = unflatten(self.fixed | {name: rows[place] for name, rows in self.table.items()})
        output = self.denoiser(noisy, timestep=timestep.float(), **condition).sample  # [B, 4 or 8, 8, 8]
        loss = F.mse_loss(output[:, :4], target)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        torch._foreach_lerp_(self.averages, self.parameters, 1 - self.args.ema_decay)
        self.running_loss.lerp_(loss.detach(), 0.01)

    def set_learning_rate(self, step):
        """Linear warm-up, then half a cosine to a hundredth."""
        warm_up = WARM_UP_SHARE * self.args.steps
        progress = min(max(0, step - warm_up) / (self.args.steps - warm_up), 1)
        share = min(1, (step + 1) / warm_up) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)
        self.lr.fill_(self.args.lr * share)

    def save(self, path, step):
        states = {name: getattr(self, name).state_dict() for name in ("denoiser", "average", "optimizer")}
        save_checkpoint(states | {"loss": self.running_loss, "random": self.random.get_rng_state(), "step": step}, path)

    def resume(self, path):
        """Bring everything to where the checkpoint stands, if there is one; returns the steps done."""
        if not path.exists():
            return 0
        states = load_checkpoint(path)
        for name in ("denoiser", "average", "optimizer"):
            getattr(self, name).load_state_dict(states[name])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.running_loss.copy_(states["loss"])
        self.random.set_rng_state(states["random"])
        return states["step"]

    @property
    def random(self):
        """The module whose random state the device draws from."""
        return torch.cuda if self.device.type == "cuda" else torch


def train_denoiser(training, checkpoint):
    """Train to the end; the averaged denoiser and its running loss.

    The file `checkpoint` is kept up to date; a training that was cut off goes on from it.
    """
    steps = training.args.steps
    first = training.resume(checkpoint)
    run_step = graphed(training.step) if training.device.type == "cuda" else training.step
    for step in (progress := tqdm(range(first, steps), initial=first, total=steps, desc="denoiser", mininterval=5)):
        training.set_learning_rate(step)
        run_step()
        if (step + 1) % CHECKPOINT_STEPS == 0:
            training.save(checkpoint, step + 1)
            progress.set_postfix(loss=f"{training.running_loss.item():.4f}", refresh=False)
    checkpoint.unlink(missing_ok=True)
    return training.average.eval(), training.running_loss.item()


def graphed(step, eager_steps=3):
    """`step` that runs as given for the first few calls and then as one CUDA graph recorded from it."""
    stream, calls, graph = torch.cuda.Stream(), itertools.count(), torch.cuda.CUDAGraph()

    def run():
        call = next(calls)
        if call < eager_steps:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            return
        if call == eager_steps:
            with torch.cuda.graph(graph, stream=stream):
                step()
        graph.replay()

    return run


def unshare(denoiser):
    """A copy of the denoiser in which no two modules are the same one, as diffusers loads it."""
    copied = copy.deepcopy(denoiser)
    for name, module in list(copied.named_modules(remove_duplicate=False)):
        if name:
            parent = copied.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], copy.deepcopy(module))
    return copied


def load_averaged(denoiser, folder):
    """Give the denoiser the weights of the trained one in `folder`."""
    trained = type(denoiser).from_pretrained(folder, dtype=torch.float32)
    denoiser.load_state_dict(trained.state_dict())


def shared_parts(args, recipe, device):
    """The autoencoder and {name: (tokenizer, encoder)} of the recipe, made now if they do not stand in `parts`."""
    folder = args.outdir / "parts"
    if not (args.outdir / "digit_classifier").exists():
        classifier, accuracy = train_classifier(device)
        save_classifier(classifier, args.outdir / "digit_classifier")
        print("classifier: right in digit {:.2%}, ink {:.2%}, paper {:.2%} of held-out digits".format(*accuracy))
    if not (folder / "vae").exists():
        vae = train_vae(device, args.vae_steps)
        print(f"autoencoder: {vae_psnr(vae):.1f} dB on real digits")
        vae.half().save_pretrained(folder / "vae")
    for name in filter(None, recipe.text_encoders):
        if not (folder / name).exists():
            tokenizer, encoder, told = train_text_encoder(name, device)
            print(f"{name}: tells {told:.2%} of the captions")
            encoder.half().save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
    vae = AutoencoderKL.from_pretrained(folder / "vae").to(device)
    return vae, {name: load_text_encoder(name, folder / name) for name in filter(None, recipe.text_encoders)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("family", choices=list(RECIPES))
    parser.add_argument("--steps", type=int, default=20_000, help="training steps of the denoiser")
    parser.add_argument("--vae_steps", type=int, default=8_000, help="training steps of the autoencoder")
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=200_000, help="digits drawn and encoded before training")
    parser.add_argument("--go_on", action="store_true", help="start from the denoiser that stands in the folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--ema_decay", type=float, default=0.999)
    parser.add_argument("--outdir", type=Path, default=Path(__file__).parent)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    device = torch.device(args.device)
    torch.backends.cuda.matmul.allow_tf32 = True

    recipe = RECIPES[args.family]
    vae, text_encoders = shared_parts(args, recipe, device)
    torch.manual_seed(args.seed)
    denoiser = recipe.denoiser()
    if args.go_on:
        load_averaged(denoiser, args.outdir / args.family / recipe.denoiser_name)
    pipeline = assemble(args.family, denoiser, vae, text_encoders).to(device)
    latents, subjects = encode_digits(vae, args.pictures)
    data = (latents * vae.config.scaling_factor, subjects)
    training = Training(pipeline, recipe, data, args)
    average, loss = train_denoiser(training, args.outdir / f"{args.family}.training.pt")
    print(f"{args.family}: loss {loss:.4f}")
    trained = assemble(args.family, unshare(average), vae, text_encoders)
    trained.to("cpu", torch.float16).save_pretrained(args.outdir / args.family)


if __name__ == "__main__":
    main()
