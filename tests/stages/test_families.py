"""All eighteen scripts on the embedded models, by the command lines of the published README."""

import ast
import os
import pickle
import shlex
import shutil

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from evaluation import quant_cache
from models.families import FAMILIES
from models.pipelines import load_denoiser
from quant import config
from quant.file_keys import by_file_key
from quant.slots import find_slots
from stages import infer, multiquantizer
from stages.labelling import eval_random, labeller

STAGES = {"multiquantizer": multiquantizer, "eval_random": eval_random, "infer": infer}
INFER = {  # as in the published README
    "pixart_alpha": "--outdir alpha_sample_w4a8 --q_config quant_configs/alpha_40.pkl --quant_act --act_bit 8 "
    "--prompt 'a lion riding a bike in Paris' --n_imgs 4",
    "pixart_sigma": "--outdir sigma_sample_w39a8 --q_config quant_configs/sigma_39.pkl --quant_act --act_bit 8 "
    "--prompt 'a lion riding a bike in Paris' --n_imgs 4",
    "hunyuan": "--outdir hunyuan_sample_w4a8 --q_config quant_configs/hunyuan_40.pkl --quant_act --act_bit 8 "
    "--prompt 'a lion riding a bike in Paris' --n_imgs 4",
    "sdxl": "--outdir sdxl_sample_w37a16 --q_config quant_configs/sdxl_37.pkl "
    "--prompt 'a lion riding a bike in Paris' --n_imgs 4",
    "sdv15": "--outdir sdv15_sample_w4a16 --q_config quant_configs/sdv15_40.pkl "
    "--prompt 'a lion riding a bike in Paris' --n_imgs 4",
    "dit": "--outdir dit_sample_w4a16 --q_config quant_configs/dit_40.pkl --cls_id 3 --n_imgs 4",  # it has 833; ten here
}
OUTDIR = {"pixart_alpha": "alpha", "pixart_sigma": "sigma"}
QUICK = ("--steps", 3)


EVERY = {name: pytest.param(name, marks=pytest.mark.xdist_group(f"family {name}")) for name in FAMILIES}
SLOW = {name: pytest.param(name, marks=[*each.marks, pytest.mark.slow]) for name, each in EVERY.items()}


def only(*names):
    """For tests of the flags' logic, which is the same for all families."""
    return pytest.mark.parametrize("workplace", [EVERY[name] for name in names], indirect=True)


def quickly(*names):
    """For all families, but where tests are not to take long for these alone."""
    each = [(EVERY if name in names else SLOW)[name] for name in FAMILIES]
    return pytest.mark.parametrize("workplace", each, indirect=True)


@pytest.fixture(scope="module", params=EVERY.values())
def workplace(request, tmp_path_factory, embedded_mq):
    """A family, and a folder with its multiquantizer and a published-style configuration."""
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(family.name)
    shutil.copytree(embedded_mq(family.name).parent, folder / "multiquantizers")
    denoiser = load_denoiser(family, "embedded", torch.device("cpu"))
    (folder / "quant_configs").mkdir()
    slots = find_slots(denoiser, family.slot_rules)
    configuration = by_file_key(config.draw_random(slots, seed=0, index=0, a_u=0.0), slots)
    (folder / family.q_config).write_bytes(pickle.dumps(configuration, protocol=4))
    return family, folder


@pytest.fixture
def in_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace[1])
    return workplace


def images_of(outdir):
    """uint8 images of the only run in `outdir`."""
    (run,) = outdir.iterdir()
    return np.stack([np.asarray(Image.open(path)) for path in sorted((run / "samples").iterdir())])


def test_infer_by_the_published_command(in_workplace, run_script):
    family, folder = in_workplace
    flags = shlex.split(INFER[family.name])
    code, printed = run_script(infer, family.name, *flags, "--model_id", "embedded", *QUICK)
    assert code == 0, printed
    images = images_of(folder / flags[1])
    assert images.shape == (4, 64, 64, 3) and images.std() > 10


def label_flags(family):
    outdir = f"{OUTDIR.get(family.name, family.name)}_random_seed42"
    return "--outdir", outdir, "--model_id", "embedded", "--num_archs", 2, "--n_imgs", 6, *QUICK


@quickly("pixart_alpha", "dit", "sdv15")
def test_eval_random_by_the_published_command(in_workplace, run_script):
    family, folder = in_workplace
    flags = label_flags(family)
    code, printed = run_script(eval_random, family.name, *flags)
    assert code == 0, printed
    rows = quant_cache.load(folder / flags[1] / "quant_cache.pkl")
    assert len(rows) == 2 and all(tuple(row) == quant_cache.KEYS and len(row["config"]) == family.num_keys for row in rows)
    assert 3 < rows[0]["avg_bits"] < family.precision_bits and rows[0]["bops"] > 0


@only("pixart_alpha", "dit")
def test_labels_go_on_with_the_same_flags_alone(in_workplace, run_script):
    """With a text encoder and without."""
    family, _ = in_workplace
    flags = label_flags(family)
    for _ in range(2):
        assert run_script(eval_random, family.name, *flags)[0] == 0  # the second time nothing is left to do
    code, printed = run_script(eval_random, family.name, *flags, "--res", "128")
    assert code == 2 and ("not 128" in printed or "images of 64 px only" in printed)


@quickly("dit")
def test_activations_act_and_fewer_bits_change_more(in_workplace, run_script):
    """The pictures differ with --quant_act, and 6 bits are farther from none than 8."""
    family, folder = in_workplace
    images = {}
    for name, flags in {"a16": (), "a8": ("--quant_act",), "a6": ("--quant_act", "--act_bit", 6)}.items():
        common_flags = ("--model_id", "embedded", "--n_imgs", 2, "--no_compare", "--outdir", name, *QUICK)
        code, printed = run_script(infer, family.name, *common_flags, *flags)
        assert code == 0, printed
        images[name] = images_of(folder / name).astype(float)
    eight, six = (((images[name] - images["a16"]) ** 2).mean() for name in ("a8", "a6"))
    assert 0 < eight < six


@only("dit")
def test_act_bit_alone_does_nothing(in_workplace, run_script):
    family, folder = in_workplace
    for name, flags in {"plain": (), "bits": ("--act_bit", 6)}.items():
        common_flags = ("--model_id", "embedded", "--n_imgs", 1, "--no_compare", "--outdir", name, "--steps", 2)
        assert run_script(infer, family.name, *common_flags, *flags)[0] == 0
    assert np.array_equal(images_of(folder / "plain"), images_of(folder / "bits"))


@pytest.mark.parametrize("stage", STAGES)
def test_the_six_scripts_of_a_stage_differ_only_by_family(stage):
    bodies = set()
    for name in FAMILIES:
        tree = ast.parse((ROOT / "scripts" / f"{name}_{stage}.py").read_text())
        assert FAMILIES[name].title in ast.get_docstring(tree)
        bodies.add(ast.unparse(tree.body[1:]).replace(repr(name), "FAMILY"))
    module = STAGES[stage].__name__.removeprefix("stages.")
    assert bodies == {f"from stages.run import run_script\nif __name__ == '__main__':\n    run_script('{module}', FAMILY)"}


def test_scripts_name_two_commands():
    paths = sorted((ROOT / "scripts").glob("*.py"))
    others = {path.stem for path in paths} - {f"{name}_{stage}" for name in FAMILIES for stage in STAGES}
    assert others == {"quant_cache_report", "train_predictor", "build_config", "plot_insights", "plot_dag", "quantize"}
    for path in paths:
        text = path.read_text()
        assert text.count(f"\npython scripts/{path.name}") == 2
        assert os.linesep.join(text.splitlines()[-2:]).startswith("if __name__")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_single_files_are_offered_where_diffusers_reads_them(family):
    assert family.in_one_file == hasattr(getattr(diffusers, family.pipeline), "from_single_file")


@pytest.fixture
def seen(monkeypatch):
    """The flags {name: value} with which images are asked for, which then stops."""
    seen = {}

    def check_first(args, *_):
        seen.update(args)
        raise OSError("stop")

    monkeypatch.setattr(infer, "check_first", check_first)
    return seen


def test_published_names_of_flags(seen, run_script):
    """sdv15 has the published names of its flags beside the project's own."""
    flags = ("--ckpt", "embedded", "--ddim_steps", 7, "--ddim_eta", 0.0, "--scale", 3.5, "--res", 64, "--seed", 3)
    code, printed = run_script(infer, "sdv15", *flags)
    assert code == 2 and "stop" in printed
    assert (seen["model_id"], seen["steps"], seen["guidance"], seen["res"], seen["seed"]) == ("embedded", 7, 3.5, 64, 3)
    code, printed = run_script(infer, "sdv15", "--ddim_eta", 0.5)
    assert code == 2 and "PLMS" in printed


@pytest.mark.parametrize("name", list(FAMILIES))
def test_published_defaults(name, seen, run_script):
    """Without flags the published prompts, sizes, steps, guidance, file names are asked for."""
    run_script(infer, name)
    family = FAMILIES[name]
    assert str(seen["outdir"]) == f"{name}_sample" and str(seen["multi_chkpt"]) == f"multiquantizers/{name}_mq.pt"
    assert seen["seed"] == 42 and seen["act_bit"] == 8 and not seen["quant_act"]
    steps = {"pixart_alpha": 20, "pixart_sigma": 20, "hunyuan": 50, "sdxl": 40, "sdv15": 50, "dit": 250}
    pixels = {"pixart_sigma": 1024, "hunyuan": 1024, "dit": None}  # DiT makes only its own, 512
    assert seen["steps"] == steps[name] and seen["res"] == pixels.get(name, 512)
    assert seen["q_config"] == family.q_config
    if name == "dit":
        assert seen["cls_id"] == [833]
    else:
        assert seen["prompt"] == ["a lion riding a bike in Paris"]
    assert seen.get("refiner_id") == ("stabilityai/stable-diffusion-xl-refiner-1.0" if name == "sdxl" else None)


@pytest.mark.slow
def test_sdxl_parts_stitch_themselves(tmp_path, monkeypatch, run_script):
    monkeypatch.chdir(tmp_path)
    denoiser = load_denoiser(FAMILIES["sdxl"], "embedded", torch.device("cpu"))
    monkeypatch.setattr(multiquantizer, "load_denoiser", lambda *_: denoiser)  # once: fitting leaves it as it is
    parts = FAMILIES["sdxl"].prefixes
    for prefix in parts:
        code, printed = run_script(multiquantizer, "sdxl", "--model_id", "embedded", "--prefix", prefix)
        assert code == 0 and (tmp_path / "multiquantizers" / f"sdxl_embedded_{prefix}_mq.pt").exists()
        assert ("parts still to fit" in printed) == (prefix != parts[-1])
    whole = tmp_path / "multiquantizers" / "sdxl_embedded_mq.pt"
    stitched = whole.read_bytes()
    whole.unlink()
    assert run_script(multiquantizer, "sdxl", "--model_id", "embedded", "--stitch")[0] == 0
    assert whole.read_bytes() == stitched
    assert len(torch.load(whole, weights_only=True)["slots"]) == 803
    (tmp_path / "multiquantizers" / "sdxl_embedded_mid_block_mq.pt").unlink()
    code, printed = run_script(multiquantizer, "sdxl", "--model_id", "embedded", "--stitch")
    assert code == 2 and "sdxl_embedded_mid_block_mq.pt" in printed


@only("sdv15")
def test_clip_score_is_a_seventh_key_only_when_asked_for(in_workplace, monkeypatch, tmp_path, run_script):
    family, _ = in_workplace

    class FixedScore:
        def __init__(self, model, processor, device):
            pass

        def scores(self, images, prompts):
            assert len(images) == len(prompts) == 2
            return np.array([20.0, 30.0])

    monkeypatch.setattr(labeller, "ClipScore", FixedScore)
    for module in (labeller, eval_random):
        monkeypatch.setattr(module, "load_clip", lambda model_id: (None, None))
    flags = ("--model_id", "embedded", "--num_archs", 1, "--n_imgs", 2, "--steps", 1, "--outdir", tmp_path, "--clip_score")
    assert run_script(eval_random, family.name, *flags)[0] == 0
    (row,) = quant_cache.load(tmp_path / "quant_cache.pkl")
    assert row["CLIP-score"] == 25.0 and set(row) == {*quant_cache.KEYS, "CLIP-score"}


def test_too_few_steps(in_workplace, run_script):
    """diffusers' PixArt-alpha pipeline takes a single step for a distilled model and fails."""
    family, _ = in_workplace
    code, printed = run_script(infer, family.name, "--model_id", "embedded", "--n_imgs", 1, "--no_compare", "--steps", 1)
    assert code == (2 if family.name == "pixart_alpha" else 0) and "Traceback" not in printed


@only("pixart_alpha")
def test_prompts_file(in_workplace, tmp_path, run_script):
    family, _ = in_workplace
    (tmp_path / "prompts.txt").write_text("a red one on a blue page\na green two on white\n")
    flags = ("--model_id", "embedded", "--num_archs", 1, "--n_imgs", 3, "--steps", 2, "--outdir", tmp_path / "labels")
    assert run_script(eval_random, family.name, *flags, "--prompts", tmp_path / "prompts.txt")[0] == 0
    code, printed = run_script(eval_random, family.name, *flags)
    assert code == 2 and "prompts_key" in printed  # other prompts, other labels
