"""Any pipeline is quantized by one command into a folder that diffusers loads, and the families' scripts take."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, run_here
from hub_layouts.hub import hub_cache, use_cache
from huggingface_hub import ModelCard
from PIL import Image
from zoo import ZOO

from errors import InputError
from models import any_pipeline
from models.pipelines import EMBEDDED_FOLDER
from quant import QuantizedModel
from quant.layers import packed_layers
from quant.registry import SEARCH_SPACE
from quant.slots import ANY_MODULE, weight_layers
from stages import quantize as quantize_stage
from stages import quantize_choice, quantize_files, sensitivities
from stages.quantize_card import base_header
from stages.record_file import RecordFile

CALLS = {
    "flux": ("--res", 16, "--call", "max_sequence_length=16"),
    "wan_2_2": ("--res", 16, "--call", "max_sequence_length=16", "num_frames=5"),
    "sana": ("--res", 32, "--call", "max_sequence_length=16", "complex_human_instruction=null"),
}
FRESH = """
import sys, numpy, torch, quant
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
call = eval(sys.argv[2])
out = pipe(**call, generator=torch.Generator().manual_seed(42), output_type="np")
numpy.save(sys.argv[3], out.images[0] if hasattr(out, "images") else out.frames[0][0])
"""


def quantize(*flags):
    return run_here("quantize.py", *flags)


@pytest.fixture(scope="module")
def zoo_folder(built_once):
    """Folder of a zoo pipeline by its name."""
    return lambda name: built_once(f"zoo_{name}", lambda folder: ZOO[name].build_pipeline().save_pretrained(folder))


@pytest.fixture(scope="module")
def packed(built_once, zoo_folder):
    """Folder of a quantized zoo pipeline by its name, with one image before and after."""

    def path_of(name):
        def build(folder):
            flags = ("--model_id", zoo_folder(name), "--output", folder / "out", "--n_imgs", 1, "--steps", 2, *CALLS[name])
            code, printed = quantize(*flags, "--prompt", "a red seven", "--config", "uniform:mse-4")
            assert code == 0, printed
            assert f"contact sheet: {folder / 'out' / 'contact_sheet.png'}" in printed

        return built_once(f"packed_{name}", build) / "out"

    return path_of


def entries(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", CALLS)
def test_every_denoiser_is_packed_and_all_else_is_as_it_was(packed, zoo_folder, name):
    base, out = zoo_folder(name), packed(name)
    assert entries(out) - entries(base) == {"README.md", "contact_sheet.png"}
    assert entries(base) <= entries(out)
    for path in entries(base):
        if path.split("/")[0] not in ZOO[name].denoiser_names:
            assert (out / path).read_bytes() == (base / path).read_bytes(), path
    for component in ZOO[name].denoiser_names:
        settings = json.loads((out / component / "config.json").read_text())["quantization_config"]
        assert settings["quant_method"] == "qua2sedimo" and set(settings["weights"].values()) == {"mse-4"}
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("name", CALLS)
def test_it_draws_what_its_decoded_weights_draw(packed, zoo_folder, name):
    """An independent route: the base's pipeline, each weight written over with the decoded one."""
    packed_pipeline = diffusers.DiffusionPipeline.from_pretrained(packed(name))
    base = diffusers.DiffusionPipeline.from_pretrained(zoo_folder(name))
    for each in (packed_pipeline, base):
        each.set_progress_bar_config(disable=True)
    before = ZOO[name].draw(base)
    for component in ZOO[name].denoiser_names:
        denoiser, layers = getattr(base, component), dict(packed_layers(getattr(packed_pipeline, component)))
        assert layers
        for path, layer in layers.items():
            denoiser.get_submodule(path).weight.data.copy_(layer.decoded())
    after = ZOO[name].draw(packed_pipeline)
    assert np.array_equal(after, ZOO[name].draw(base)) and not np.array_equal(after, before)


def cell(sheet, row, rows=2):
    """A row's image on a contact sheet of one column, enlarged as it is there."""
    height = (sheet.height - 6) // rows
    return np.asarray(sheet.crop((6, row * height + 6 + 18 + 6, 6 + 128, row * height + 6 + 18 + 6 + 128)), dtype=float)


@pytest.mark.slow
def test_a_fresh_process_draws_the_image_that_the_sheet_shows(packed, tmp_path):
    call = "dict(prompt=['a red seven'], num_inference_steps=2, height=16, width=16, max_sequence_length=16)"
    command = [sys.executable, "-c", FRESH, str(packed("flux")), call, str(tmp_path / "drawn.npy")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    drawn = Image.fromarray((np.load(tmp_path / "drawn.npy") * 255).round().astype(np.uint8))
    sheet = Image.open(packed("flux") / "contact_sheet.png").convert("RGB")
    enlarged = np.asarray(drawn.resize((128, 128), Image.Resampling.BICUBIC), dtype=float)
    assert np.array_equal(cell(sheet, 1), enlarged) and not np.array_equal(cell(sheet, 0), enlarged)


def test_large_files_are_linked_and_small_ones_copied(tmp_path):
    base = tmp_path / "base"
    base.mkdir()
    (base / "large.bin").write_bytes(bytes(quantize_files.LINKED_BYTES))
    (base / "cached").symlink_to(base / "large.bin")
    (base / "small.json").write_text("{}")
    for name in ("cached", "small.json"):
        quantize_files.link_or_copy((base / name).resolve(), tmp_path / name)
    assert (tmp_path / "cached").samefile(base / "large.bin") and not (tmp_path / "cached").is_symlink()
    assert not (tmp_path / "small.json").samefile(base / "small.json")


def test_the_card_tells_what_is_known(packed, zoo_folder, tmp_path):
    card = (packed("wan_2_2") / "README.md").read_text()
    for component in ("transformer", "transformer_2"):
        size = (packed("wan_2_2") / component / "diffusion_pytorch_model.safetensors").stat().st_size
        assert f"| {component} | WanTransformer3DModel |" in card and f"| {size:,} (" in card
    assert "import quant" in card and "frames = pipe(" in card and "(contact_sheet.png)" in card and "mse-4" in card
    assert str(zoo_folder("wan_2_2").parent) not in card  # whose folders they are is no one's business
    header = "---\nlicense: apache-2.0\npipeline_tag: text-to-image\n---\n# Base\n"
    (tmp_path / "README.md").write_text(header)
    (tmp_path / "model_index.json").write_text("{}")
    told = base_header(any_pipeline.open_pipeline(str(tmp_path)))
    assert told == {"license": "apache-2.0", "pipeline_tag": "text-to-image"}


FLUX = ("--n_imgs", 0, "--config", "uniform:mse-4")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--config", "uniform:nf-4"), "nf-4"),
        (("--config", "nowhere.pkl"), "nowhere.pkl: no such file"),
        (("--avg_bits", 1), "the smallest configuration of"),
        (("--avg_bits", 4, "--config", "uniform:mse-4"), "give one of them"),
        (("--config", "uniform:mse-4", "--fix", "proj_out=float"), "--fix: is for the search that --avg_bits asks for"),
        (("--avg_bits", 12, "--methods", "mse-4", "mse-9"), "unknown quantizer 'mse-9'"),
        (("--avg_bits", 12, "--fix", "nowhere=mse-4"), "--fix nowhere=mse-4: the search space has only affine-2"),
        (("--avg_bits", 12, "--min_bits", "nowhere=4"), "--min_bits nowhere=4: no weight of"),
        (("--exclude", "no_such_layer"), "--exclude no_such_layer: no weight of transformer lies there"),
        (("--exclude", "*"), "its transformer has no weight that can be quantized"),
        (("--call", "no_such=1"), "--call no_such: FluxPipeline has no such argument"),
        (("--call", "16"), "'16' is not NAME=VALUE"),
        (("--dtype", "int4"), "--dtype"),
        (("--offload", "model", "--device", "cpu"), "is for GPUs"),
    ],
)
def test_what_is_wrong_is_one_line_and_writes_nothing(zoo_folder, tmp_path, flags, said):
    code, printed = quantize("--model_id", zoo_folder("flux"), "--output", tmp_path / "out", *flags)
    assert code == 2 and said in printed and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_single_file_is_told_how_to_become_a_folder(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    code, printed = quantize("--model_id", tmp_path / "model.safetensors", "--output", tmp_path / "out")
    assert code == 2 and "from_single_file" in printed and printed.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_output_is_replaced_only_if_asked_for_and_a_pipeline(packed, zoo_folder, tmp_path):
    flags = ("--model_id", zoo_folder("flux"), *FLUX, "--output")
    out = tmp_path / "out"
    out.mkdir()
    (out / "diary.txt").write_text("mine")
    assert "--overwrite replaces it" in quantize(*flags, out)[1]
    assert "is no pipeline" in quantize(*flags, out, "--overwrite")[1]
    assert (out / "diary.txt").read_text() == "mine"
    (out / "model_index.json").write_text("{}")
    code, printed = quantize(*flags, out, "--overwrite")
    assert code == 0, printed
    assert not (out / "diary.txt").exists() and (out / "transformer").is_dir()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for inside in (zoo_folder("flux"), zoo_folder("flux") / "vae", zoo_folder("flux").parent):
        assert "model's own folder" in quantize(*flags, inside, "--overwrite")[1]
    code, printed = quantize("--model_id", packed("flux"), "--output", tmp_path / "again", *FLUX)
    assert code == 2 and "already quantized by this program" in printed


def test_a_run_that_was_cut_off_goes_on_from_its_fits(zoo_folder, tmp_path, monkeypatch):
    flags = ("--model_id", zoo_folder("flux"), *FLUX, "--output", tmp_path / "out")
    fit_entry, fitted, stop = quantize_choice.fit_entry, [], 3

    def counted(weight, words):
        if len(fitted) == stop:
            raise KeyboardInterrupt
        fitted.append(weight.shape)
        return fit_entry(weight, words)

    monkeypatch.setattr(quantize_choice, "fit_entry", counted)
    code, printed = quantize(*flags)
    assert code == 130 and "the same command goes on" in printed and not (tmp_path / "out").exists()
    stop = None
    code, printed = quantize(*flags)
    assert code == 0, printed
    weights = len(list(weight_layers(ZOO["flux"].build_denoiser())))
    assert len(fitted) == weights


def test_a_full_disk_is_told_before(zoo_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(quantize_files.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    code, printed = quantize("--model_id", zoo_folder("flux"), *FLUX, "--output", tmp_path / "out")
    assert code == 2 and "1.0 kB are free" in printed and not list(tmp_path.iterdir())


def test_a_full_disk_is_told_in_the_midst(tmp_path, small_files):
    """The library that writes the weights has an error of its own for that."""
    with pytest.raises(InputError, match=r"transformer: cannot be written \(File too large\); the same command goes on"):
        quantize_files.save_denoiser(ZOO["flux"].build_denoiser(), tmp_path / "transformer")


def test_a_pipeline_is_put_aside_until_the_new_one_is_there(tmp_path, monkeypatch):
    """Where a run is killed between the two, the old one is in its work folder, and the next run goes on."""
    output, work, stranger = tmp_path / "out", tmp_path / "out.partial", tmp_path / "out.replaced"
    for folder, text in ((output, "old"), (work / "pipeline", "new"), (stranger, "a stranger's")):
        folder.mkdir(parents=True)
        (folder / "text").write_text(text)
    replace, killed = os.replace, []

    def replace_once(*args):
        if killed:
            raise KeyboardInterrupt
        killed.append(args)
        replace(*args)

    monkeypatch.setattr(quantize_files.os, "replace", replace_once)
    with pytest.raises(KeyboardInterrupt):
        quantize_files.publish(work / "pipeline", output)
    assert not output.exists() and (work / "replaced" / "text").read_text() == "old"
    monkeypatch.setattr(quantize_files.os, "replace", replace)
    quantize_files.publish(quantize_files.make_work_folder(output) / "pipeline", output)
    assert (output / "text").read_text() == "new" and (stranger / "text").read_text() == "a stranger's"


def test_a_folder_of_someone_else_is_not_taken_to_work_in(zoo_folder, tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "diary.txt").write_text("mine")
    code, printed = quantize("--model_id", zoo_folder("flux"), *FLUX, "--output", tmp_path / "out")
    assert code == 2 and "holds diary.txt" in printed and (tmp_path / "out.partial" / "diary.txt").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_packed_in_the_precision_that_is_asked_for(zoo_folder, tmp_path, dtype):
    flags = (*FLUX, "--dtype", dtype)
    code, printed = quantize("--model_id", zoo_folder("flux"), "--output", tmp_path / "out", *flags)
    assert code == 0, printed
    loaded = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out" / "transformer", dtype=getattr(torch, dtype))
    expected = ZOO["flux"].build_denoiser().to(getattr(torch, dtype))
    QuantizedModel(expected).pack("mse-4", show=False)
    state = expected.state_dict()
    assert all(torch.equal(state[key], value) for key, value in loaded.state_dict().items())


def test_exclude_leaves_modules_float(zoo_folder, tmp_path):
    exclude = ("--exclude", "proj_out", "transformer_blocks.*.attn")
    code, printed = quantize("--model_id", zoo_folder("flux"), *FLUX, "--output", tmp_path / "out", *exclude)
    assert code == 0, printed
    paths = {path for path, _ in weight_layers(ZOO["flux"].build_denoiser())}
    left = {path for path in paths if path == "proj_out" or re.match(r"transformer_blocks\.\d+\.attn\.", path)}
    settings = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]
    assert len(left) > 5 and set(settings["weights"]) == paths - left


def test_variants_are_found_under_their_plain_names(zoo_folder, tmp_path):
    base = tmp_path / "base"
    pipeline = ZOO["flux"].build_pipeline()
    pipeline.save_pretrained(base, variant="fp16", max_shard_size="40KB")
    source = any_pipeline.open_pipeline(str(base))
    files = any_pipeline.needed_files(source, ["transformer"])
    quantize_files.place_files(tmp_path / "out", files, source)
    (base / "unused.safetensors").write_bytes(b"x")
    assert not [name for name in entries(tmp_path / "out") if "fp16" in name or name.startswith(("transformer/", "unused"))]
    loaded = diffusers.FluxPipeline.from_pretrained(tmp_path / "out", transformer=pipeline.transformer)
    state = loaded.text_encoder_2.state_dict()
    assert all(torch.equal(state[key], value) for key, value in pipeline.text_encoder_2.state_dict().items())


class _Index:
    """A source of which nothing is read but its index."""

    def __init__(self, pipeline):
        self.model_id = "zoo"
        self.index = {name: list(value) if isinstance(value, tuple) else value for name, value in pipeline.config.items()}


@pytest.mark.parametrize("name", ZOO)
def test_denoisers_are_found_by_what_they_are(name):
    assert set(any_pipeline.denoiser_names(_Index(ZOO[name].build_pipeline()))) == set(ZOO[name].denoiser_names)


@pytest.mark.slow
def test_average_bits_are_kept_to_and_beat_the_uniform_choice(zoo_folder, tmp_path, monkeypatch):
    """The denoiser is asked which weights are sensitive; asked again, its answers are read from their file."""
    flags = ("--model_id", zoo_folder("flux"), "--n_imgs", 2, "--steps", 2, "--calls", 2, "--no_compare", *CALLS["flux"])
    flags += ("--methods", *SEARCH_SPACE)
    limit = 12.0
    code, printed = quantize(*flags, "--output", tmp_path / "out", "--avg_bits", limit, "--probe", "exact")
    assert code == 0, printed
    told = float(re.search(r"average ([\d.]+) bits", printed)[1])
    assert told <= limit
    weights = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]["weights"]
    records = RecordFile(tmp_path / "out_sensitivity.exact", {})
    shifts = {
        name[1].removeprefix("model.").removesuffix(".weight_quantizer"): records[name]["shifts"] for name in records.names
    }
    assert weights.keys() == shifts.keys()

    def length(words):
        return sum(shifts[path][SEARCH_SPACE.index(word)].float() for path, word in words.items()).norm()

    uniform = [length(dict.fromkeys(weights, word)) for word in ("mse-4", "mse-3", "kmeans_all-4", "kmeans_all-3")]
    assert length(weights) < 0.9 * min(uniform)  # all of these are within the limit
    code, printed = quantize(*flags, "--output", tmp_path / "sketched", "--avg_bits", limit)
    assert code == 0, printed
    config = json.loads((tmp_path / "sketched" / "transformer" / "config.json").read_text())
    assert length(config["quantization_config"]["weights"]) < 0.95 * min(uniform)
    monkeypatch.setattr(sensitivities, "measure_one", lambda *_: pytest.fail("asked again"))
    again = (*flags, "--output", tmp_path / "again", "--sensitivity", tmp_path / "out_sensitivity.exact", "--probe", "exact")
    code, printed = quantize(*again, "--avg_bits", limit)
    assert code == 0 and f"average {told:.3f} bits" in printed, printed
    code, printed = quantize(*again, "--avg_bits", limit, "--seed", 1, "--overwrite")
    assert code == 2 and "was measured with" in printed


@pytest.fixture(scope="module")
def packed_family(built_once):
    """Folder of an embedded family's pipeline, quantized, by the family's name; and its images before and after."""

    def path_of(name, *flags):
        def build(folder):
            command = ("--model_id", EMBEDDED_FOLDER / name, "--output", folder / "out", "--config", "uniform:mse-4")
            code, printed = quantize(*command, "--n_imgs", 2, "--steps", 4, *flags)
            assert code == 0, printed

        return built_once(f"packed_{name}", build) / "out"

    return path_of


@pytest.mark.slow
def test_a_packed_dit_is_taken_by_its_family(packed_family, mq, tmp_path, monkeypatch):
    """Its images are those of the float folder under the same configuration."""
    monkeypatch.chdir(tmp_path)
    folder = packed_family("dit", "--prompt", 3, 8)
    given = ("--steps", 4, "--cls_id", 3, 8, "--guidance", 4, "--outdir", tmp_path, "--batch_size", 2)
    code, printed = run_here("dit_infer.py", "--model_id", folder, *given, "--run", "packed")
    assert code == 0 and "no full-precision images to compare" in printed, printed
    base = tmp_path / "base"
    shutil.copytree(EMBEDDED_FOLDER / "dit", base)
    own = ("--q_config", "uniform:mse-4", "--multi_chkpt", mq, "--no_compare")
    code, printed = run_here("dit_infer.py", "--model_id", base, *given, *own, "--run", "float")
    assert code == 0, printed
    for number in range(2):
        ours, theirs = (Image.open(tmp_path / run / "samples" / f"00{number}.png") for run in ("packed", "float"))
        assert np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs)).max() <= 1
    code, printed = run_here("dit_infer.py", "--model_id", folder, *given, "--quant_act", "--run", "activations")
    assert code == 0, printed
    changed = Image.open(tmp_path / "activations" / "samples" / "000.png")
    assert not np.array_equal(np.asarray(changed), np.asarray(Image.open(tmp_path / "packed" / "samples" / "000.png")))


@pytest.mark.parametrize(
    ("script", "flags", "said"),
    [
        ("dit_multiquantizer.py", (), "its transformer is already quantized by this program"),
        ("dit_eval_random.py", (), "its transformer is already quantized by this program"),
        ("dit_infer.py", ("--q_config", "uniform:mse-3"), "is already quantized by this program"),
    ],
)
def test_a_packed_model_is_not_quantized_again(packed_family, tmp_path, monkeypatch, script, flags, said):
    monkeypatch.chdir(tmp_path)
    code, printed = run_here(script, "--model_id", packed_family("dit", "--prompt", 3, 8), *flags)
    assert code == 2 and said in printed and "made from" in printed and printed.count("\n") == 1


def test_ties_and_splits_of_the_families_are_kept(packed_family):
    dit = json.loads((packed_family("dit", "--prompt", 3, 8) / "transformer" / "config.json").read_text())
    assert len(dit["quantization_config"]["ties"]) == 2 * 27


@pytest.mark.slow
def test_a_packed_sdxl_is_taken_by_its_family(packed_family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = packed_family("sdxl", "--res", 64, "--prompt", "a red seven on a blue background")
    weights = json.loads((folder / "unet" / "config.json").read_text())["quantization_config"]["weights"]
    assert sum(isinstance(told, list) for told in weights.values()) == 9  # up-block conv1 in two parts
    given = ("--steps", 4, "--no_refiner", "--res", 64, "--outdir", tmp_path, "--run", "packed")
    code, printed = run_here("sdxl_infer.py", "--model_id", folder, *given)
    assert code == 0 and (tmp_path / "packed" / "samples" / "000.png").is_file(), printed


@pytest.mark.parametrize("what", ["transformer", "pipeline"])
def test_pushed_to_the_hub_as_any_model_is(packed, tmp_path, monkeypatch, what):
    """No network: what would be uploaded is looked at."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(packed("flux"))
    uploaded = {}
    for module in ("diffusers.models.modeling_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(f"{module}.create_repo", lambda repo_id, **_: SimpleNamespace(repo_id=f"someone/{repo_id}"))
        monkeypatch.setattr(f"{module}.load_or_create_model_card", lambda *_, **__: ModelCard("---\n{}\n---\n"))

    def upload(repo_id, folder_path, **_):
        uploaded.update(repo_id=repo_id, names=entries(Path(folder_path)))

    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    pushed = pipeline if what == "pipeline" else pipeline.transformer
    pushed.save_pretrained(str(tmp_path / "mine"), push_to_hub=True)
    place = "transformer/" if what == "pipeline" else ""
    assert uploaded["repo_id"] == "someone/mine"
    assert {f"{place}config.json", f"{place}diffusion_pytorch_model.safetensors", "README.md"} <= uploaded["names"]
    again = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "mine" / place)
    inputs = ZOO["flux"].inputs(again)
    assert torch.equal(again(**inputs)[0], pipeline.transformer(**inputs)[0])


def test_weights_that_are_only_read_are_found_and_stay_float(tmp_path, monkeypatch):
    """Hunyuan-DiT's pooler hands four layers' weights to one function; nothing tells so beforehand here."""
    monkeypatch.setattr(quantize_stage, "rules_of", lambda *_: ANY_MODULE)
    flags = ("--model_id", EMBEDDED_FOLDER / "hunyuan", "--config", "uniform:mse-4", "--n_imgs", 0, "--res", 64)
    code, printed = quantize(*flags, "--output", tmp_path / "out")
    assert code == 0 and "4 weights are read without a call of their layer, so stay float" in printed, printed
    weights = json.loads((tmp_path / "out" / "transformer" / "config.json").read_text())["quantization_config"]["weights"]
    assert weights and not any(".pooler." in path for path in weights)


def test_a_pipeline_that_needs_more_than_a_prompt_is_packed_without_images(tmp_path):
    flags = ("--model_id", EMBEDDED_FOLDER / "sdxl_refiner", "--output", tmp_path / "out")
    code, printed = quantize(*flags, "--avg_bits", 5)
    assert code == 2 and "cannot be called with prompt" in printed and "choose by --config" in printed
    assert not list(tmp_path.iterdir())
    code, printed = quantize(*flags, "--config", "uniform:mse-4")
    assert code == 0 and "no pictures" in printed and not (tmp_path / "out" / "contact_sheet.png").exists(), printed
    assert "contact_sheet" not in (tmp_path / "out" / "README.md").read_text()


def test_a_pipeline_that_needs_a_picture_is_given_one(tmp_path):
    Image.new("RGB", (64, 64), (200, 40, 40)).save(tmp_path / "red.png")
    flags = ("--model_id", EMBEDDED_FOLDER / "sdxl_refiner", "--config", "uniform:mse-4", "--n_imgs", 1, "--steps", 4)
    code, printed = quantize(*flags, "--output", tmp_path / "out", "--call", f"image={tmp_path / 'red.png'}")
    assert code == 0 and "contact sheet" in printed, printed
    shown = cell(Image.open(tmp_path / "out" / "contact_sheet.png").convert("RGB"), 0)
    assert shown[..., 0].mean() > shown[..., 1].mean() + 30  # it begins at the picture
    card = (tmp_path / "out" / "README.md").read_text()
    assert "image=red.png" in card and str(tmp_path) not in card
    code, printed = quantize(*flags, "--output", tmp_path / "other", "--call", "image=nowhere.png")
    assert code == 2 and "--call image=nowhere.png: cannot be read as a picture" in printed


def test_a_hub_id_is_read_from_the_cache(zoo_folder, tmp_path, monkeypatch):
    base = shutil.copytree(zoo_folder("flux"), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (base / "flux.safetensors").write_bytes(b"not needed")
    use_cache(monkeypatch, tmp_path / "home")
    hub_cache(tmp_path / "home", "someone/flux", base)
    code, printed = quantize("--model_id", "someone/flux", *FLUX, "--output", tmp_path / "out")
    assert code == 0, printed
    assert entries(tmp_path / "out") == entries(zoo_folder("flux")) | {"README.md"}
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "base_model: someone/flux" in card and "license: apache-2.0" in card
    code, printed = quantize("--model_id", "someone/else", *FLUX, "--output", tmp_path / "other")
    assert code == 2 and "not in the Hub's cache" in printed
