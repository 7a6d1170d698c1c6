"""The recipe: what the denoisers start as, what they are told, and a training that is cut off."""

import argparse
import functools

import diffusers
import pytest
import torch
from diffusers import AutoencoderKL

from models.embedded import train
from models.embedded.captions import all_captions, digit_and_colors
from models.embedded.classifier import answers, load_classifier
from models.embedded.denoisers import RECIPES, assemble
from models.embedded.text_encoders import load_text_encoder
from models.families import FAMILIES
from models.pipelines import EMBEDDED_FOLDER, load_denoiser

PARTS = EMBEDDED_FOLDER / "parts"
CPU = torch.device("cpu")
CAPTIONS = 24  # of two subjects
SETTINGS = argparse.Namespace(steps=4, batch_size=2, lr=1e-3, ema_decay=0.9)


@functools.cache
def vae():
    return AutoencoderKL.from_pretrained(PARTS / "vae")


@functools.cache
def text_encoder(name):
    return load_text_encoder(name, PARTS / name)


def pipeline_of(name, seed=0):
    """The recipe's untrained pipeline."""
    recipe = RECIPES[name]
    torch.manual_seed(seed)
    text_encoders = {encoder: text_encoder(encoder) for encoder in filter(None, recipe.text_encoders)}
    return assemble(name, recipe.denoiser(), vae(), text_encoders)


def start_training(name, seed=0):
    latents = torch.randn(6, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return train.Training(pipeline_of(name, seed), RECIPES[name], (latents, torch.arange(6) % 2), SETTINGS)


@pytest.fixture
def few_captions(monkeypatch):
    monkeypatch.setattr(train, "all_captions", lambda: all_captions()[:CAPTIONS])
    monkeypatch.setattr(train, "NUM_SUBJECTS", CAPTIONS // train.NUM_PHRASINGS)


@pytest.mark.parametrize("name", list(RECIPES))
def test_every_recipe_learns(few_captions, name):
    """Four steps at the same pictures and noise: the loss falls, weights and average move."""
    training, losses = start_training(name), []
    before = [parameter.clone() for parameter in training.parameters]
    for step in range(4):
        torch.manual_seed(0)
        training.set_learning_rate(1)
        training.running_loss.zero_()
        training.step()
        losses.append(training.running_loss.item())
        if step == 0:
            for then, now, average in zip(before, training.parameters, training.averages, strict=True):
                assert torch.allclose(average, 0.9 * then + 0.1 * now, atol=1e-7)
    assert losses[-1] < losses[0]
    moved = [not torch.equal(now, then) for now, then in zip(training.parameters, before, strict=True)]
    assert sum(moved) > 0.98 * len(moved)


class Knowing(torch.nn.Module):
    """A denoiser that knows the clean latents, all the same, and so what to answer."""

    def __init__(self, scheduler, clean):
        super().__init__()
        self.scheduler, self.clean = diffusers.DDPMScheduler.from_config(scheduler.config), clean
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, noisy, timestep, **_conditions):
        timestep, clean = timestep.long(), self.clean.expand_as(noisy)
        alpha = self.scheduler.alphas_cumprod[timestep].view(-1, 1, 1, 1)
        noise = (noisy - alpha.sqrt() * clean) / (1 - alpha).sqrt()
        velocity = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(clean, noise, timestep) if velocity else noise
        return argparse.Namespace(sample=torch.cat([target + self.weight, torch.ones_like(target)], dim=1))


@pytest.mark.parametrize("name", ["hunyuan", "sdv15"])
def test_the_right_answer_has_no_loss(few_captions, name):
    training = start_training(name)
    training.latents = torch.full((6, 4, 8, 8), 0.7)
    training.denoiser = Knowing(RECIPES[name].scheduler, training.latents[:1])
    for _ in range(20):
        training.step()
    assert 0 <= training.running_loss < 1e-6
    training.denoiser.weight.data.fill_(1)
    training.step()
    assert training.running_loss == pytest.approx(0.01, rel=1e-3)


def test_interrupted_training_goes_on_exactly(few_captions, tmp_path, monkeypatch):
    """Training cut off and started again, from any weights, ends with those of an undisturbed one."""
    monkeypatch.setattr(train, "CHECKPOINT_STEPS", 2)
    checkpoint = tmp_path / "t.pt"
    torch.manual_seed(0)
    whole, loss = train.train_denoiser(start_training("dit"), checkpoint)
    assert not checkpoint.exists()

    def cut(training, path, step):
        save(training, path, step)
        raise KeyboardInterrupt

    save = train.Training.save
    with monkeypatch.context() as interrupted, pytest.raises(KeyboardInterrupt):
        interrupted.setattr(train.Training, "save", cut)
        torch.manual_seed(0)
        train.train_denoiser(start_training("dit"), checkpoint)
    assert checkpoint.exists()
    resumed, loss_again = train.train_denoiser(start_training("dit", seed=7), checkpoint)
    assert loss_again == loss and not checkpoint.exists() and not resumed.training
    for (parameter, one), two in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), parameter


def test_the_learning_rate_warms_up_and_falls(few_captions):
    training = start_training("dit")
    training.args = argparse.Namespace(steps=1000, lr=2.0)
    rates = []
    for step in range(1000):
        training.set_learning_rate(step)
        rates.append(training.lr.item())
    assert (
        rates[0] == pytest.approx(2 / 30) and rates[29] == pytest.approx(2) and rates[514] == pytest.approx(1.01, abs=0.01)
    )
    assert rates[-1] == pytest.approx(0.02, rel=0.01) and training.optimizer.param_groups[0]["lr"] is training.lr


@pytest.mark.parametrize("name", list(RECIPES))
def test_conditions_are_what_the_pipeline_gives(few_captions, name):
    """Row by row; the last is of the unguided half of a guided call."""
    pipeline, recipe = pipeline_of(name), RECIPES[name]
    table, fixed = train.conditions_of(pipeline, recipe, batch_size=16)
    assert {len(rows) for rows in table.values()} == {CAPTIONS + 1}
    prompts = train.captions_for(pipeline)
    for place in (0, 17, CAPTIONS - 1):
        own = train.arguments_for(pipeline, recipe, [prompts[place]])
        for argument, rows in table.items():
            tokens = rows.shape[1] if argument in ("encoder_hidden_states", "encoder_attention_mask") else None
            theirs = own[argument][0] if tokens is None else own[argument][0, :tokens]
            assert torch.allclose(rows[place], theirs, atol=1e-5), argument
        assert own.keys() == table.keys() | fixed.keys()
    assert all(not isinstance(value, torch.Tensor) or len(value) == 1 for value in fixed.values())


def test_classes_are_the_captions_digits(few_captions):
    table, fixed = train.conditions_of(pipeline_of("dit"), RECIPES["dit"])
    digits = [digit_and_colors(place // train.NUM_PHRASINGS)[0] for place in range(CAPTIONS)]
    assert table["class_labels"].tolist() == [*digits, 1000] and fixed == {}


def test_sdxl_without_a_prompt_is_zero(few_captions):
    table, _ = train.conditions_of(pipeline_of("sdxl"), RECIPES["sdxl"])
    for argument in ("encoder_hidden_states", "added_cond_kwargs.text_embeds"):
        assert (table[argument][-1] == 0).all() and not (table[argument][:-1] == 0).flatten(1).all(1).any()
    assert table["added_cond_kwargs.time_ids"].unique(dim=0).tolist() == [[64, 64, 0, 0, 64, 64]]


def test_the_refiner_is_told_a_lower_score_without_a_prompt(few_captions):
    table, _ = train.conditions_of(pipeline_of("sdxl_refiner"), RECIPES["sdxl_refiner"])
    scores = table["added_cond_kwargs.time_ids"][:, 4]
    assert scores.tolist() == [6.0] * CAPTIONS + [2.5]
    assert not (table["encoder_hidden_states"][-1] == 0).any()


@pytest.mark.parametrize(("name", "tokens"), [("pixart_alpha", 120), ("pixart_sigma", 300)])
def test_pixart_without_a_prompt_is_told_the_empty_one(few_captions, name, tokens):
    table, _ = train.conditions_of(pipeline_of(name), RECIPES[name])
    tokenizer, encoder = text_encoder("t5")
    empty = tokenizer("", padding="max_length", max_length=tokens, return_tensors="pt")
    assert table["encoder_attention_mask"][-1].sum() == empty.attention_mask.sum() == 1
    kept = table["encoder_hidden_states"].shape[1]
    with torch.no_grad():
        assert torch.allclose(table["encoder_hidden_states"][-1], encoder(**empty)[0][0, :kept], atol=1e-5)
    assert kept == table["encoder_attention_mask"].sum(1).max() < 12


@torch.no_grad()
def test_dropped_tokens_change_nothing():
    """The trained PixArt gives the same with all 120 tokens as with the few that are not masked."""
    denoiser = load_denoiser(FAMILIES["pixart_alpha"], "embedded", CPU).float()
    pipeline = assemble("pixart_alpha", denoiser, vae(), {"t5": text_encoder("t5")})
    full = train.arguments_for(pipeline, RECIPES["pixart_alpha"], all_captions()[:1500:500])
    few = train.drop_masked_tokens(full)
    assert full["encoder_hidden_states"].shape[1] == 120 and few["encoder_hidden_states"].shape[1] < 12
    call = {"hidden_states": torch.randn(3, 4, 8, 8), "timestep": torch.tensor([5, 300, 900])}
    outputs = [denoiser(**call, **train.unflatten(arguments)).sample for arguments in (full, few)]
    assert torch.allclose(*outputs, atol=1e-5)
    masked = full["encoder_hidden_states"] + 5 * (1 - full["encoder_attention_mask"])[..., None]
    assert torch.allclose(denoiser(**call, **train.unflatten(full | {"encoder_hidden_states": masked})).sample, outputs[0])
    told = denoiser(
        **call, **train.unflatten(full | {"encoder_hidden_states": full["encoder_hidden_states"].flip(0)})
    ).sample
    assert not torch.allclose(told, outputs[0], atol=1e-2)  # it listens to the caption


def test_flatten_and_unflatten_undo_each_other():
    nested = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert train.flatten(nested) == {"a": 1, "b.c": 2, "b.d.e": 3}
    assert train.unflatten(train.flatten(nested)) == nested


@pytest.mark.parametrize("name", ["dit", "pixart_alpha", "hunyuan"])
@torch.no_grad()
def test_the_noise_prediction_starts_at_zero(few_captions, name):
    pipeline, recipe = pipeline_of(name), RECIPES[name]
    arguments = train.unflatten(train.arguments_for(pipeline, recipe, train.captions_for(pipeline)[:2]))
    out = pipeline.transformer(torch.randn(2, 4, 8, 8), timestep=torch.tensor([3.0, 900.0]), **arguments).sample
    assert out.shape == (2, 8, 8, 8)
    assert (out[:, :4] == 0).all() and (out[:, 4:] != 0).any(dim=(0, 2, 3)).all()


@torch.no_grad()
def test_dit_starts_as_adaln_zero():
    """Every block starts as the identity."""
    denoiser = RECIPES["dit"].denoiser()
    hidden = torch.randn(2, 16, 36)
    for block in (denoiser.transformer_blocks[5].train(), denoiser.transformer_blocks[27].eval()):
        assert torch.equal(block(hidden, timestep=torch.tensor([1, 9]), class_labels=torch.tensor([3, 1000])), hidden)


def test_dit_s_blocks_drop_no_labels():
    """The recipe drops them, the same for all blocks."""
    embedder = RECIPES["dit"].denoiser().train().transformer_blocks[3].norm1.emb.class_embedder
    assert len(embedder(torch.full((300,), 3)).unique(dim=0)) == 1


@pytest.mark.parametrize("name", list(FAMILIES))
def test_a_recipe_is_its_familys(name):
    recipe, family = RECIPES[name], FAMILIES[name]
    assert (recipe.pipeline, recipe.denoiser_name) == (family.pipeline, family.denoiser)
    assert dict(recipe.call) == dict(family.call)
    with torch.device("meta"):
        shapes = {key: weight.shape for key, weight in recipe.denoiser().state_dict().items()}
    trained = load_denoiser(family, "embedded", CPU).state_dict()
    assert {key: weight.shape for key, weight in trained.items()} == shapes


def test_unshared_weights_are_the_same_and_each_modules_own():
    denoiser = RECIPES["dit"].denoiser()
    apart = train.unshare(denoiser)
    ours, its = apart.state_dict(), denoiser.state_dict()
    assert ours.keys() == its.keys() and all(torch.equal(ours[key], its[key]) for key in its)
    assert len(list(apart.parameters())) == len(its) > len(list(denoiser.parameters()))
    apart.transformer_blocks[0].norm1.emb.timestep_embedder.linear_1.weight.data.zero_()
    for other in (apart, denoiser):
        assert other.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight.any()


def test_training_that_goes_on_starts_from_the_folder(tmp_path):
    trained, other = RECIPES["sdv15"].denoiser(), RECIPES["sdv15"].denoiser()
    trained.save_pretrained(tmp_path)
    train.load_averaged(other, tmp_path)
    assert all(torch.equal(one, two) for one, two in zip(trained.parameters(), other.parameters(), strict=True))


def test_latents_and_the_subjects_they_show():
    latents, subjects = train.encode_digits(vae(), count=24)
    assert latents.shape == (24, 4, 8, 8) and subjects.shape == (24,)
    assert 0.5 < (latents * vae().config.scaling_factor).std() < 2
    pictures = vae().decode(latents).sample / 2 + 0.5
    shown = answers(load_classifier(), pictures.clamp(0, 1))
    told = torch.tensor([digit_and_colors(int(subject)) for subject in subjects])
    assert (shown == told).float().mean() > 0.9
