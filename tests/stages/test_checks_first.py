"""What flags and small files tell to be wrong is told before a model, or the reference, is read."""

import pickle

import pytest
import torch
from conftest import EVAL, ROOT, tiny_model

from errors import InputError
from evaluation import fid
from models.families import FAMILIES
from quant import multiquantizer
from quant.file_keys import by_file_key
from quant.files import check_writable, save_pickle
from quant.multiquantizer import with_digests
from stages import build_config, plot_insights, q_config, sampling, score_sources
from stages.flags import Flags
from stages.labelling import eval_random
from stages.record_file import RecordFile
from stages.sensitivities import probe_settings

NONE = ("--model_id", "embedded", "--scores", "none", "--steps", 4, "--n_imgs", 2, "--calls", 2)


@pytest.fixture
def nothing_is_loaded(monkeypatch):
    for name in ("load_sampler", "load_encoder"):
        monkeypatch.setattr(sampling, name, lambda *_args, **_kwargs: pytest.fail("a model was loaded"))
    monkeypatch.setattr(fid, "reference_statistics", lambda *_args: pytest.fail("the reference was read"))


@pytest.fixture(scope="module")
def bad_files(mq, tmp_path_factory):
    """Files that are wrong in some way, by name."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "damaged.pt").write_bytes(mq.read_bytes()[:1000])
    save_pickle({"model.conv_in.weight_quantizer": "mse-4"}, folder / "foreign.pkl")
    content = torch.load(mq, weights_only=True)
    slots = content["slots"]
    save_pickle(dict.fromkeys(list(slots)[:-1], "mse-4"), folder / "short.pkl")
    save_pickle(dict.fromkeys(slots, "mse-9"), folder / "unknown.pkl")
    key = next(key for key in slots if ".norm1.emb." in key)
    tied = key.replace("transformer_blocks.0.", "transformer_blocks.1.")
    save_pickle(dict.fromkeys(slots, "mse-4") | {tied: "mse-3"}, folder / "untied.pkl")
    torch.save(with_digests(content | {"slots": dict(list(slots.items())[:-1])}), folder / "part.pt")
    with RecordFile(folder / "exact", {"probe": "exact"}):
        pass
    (folder / "labels").mkdir()
    (folder / "labels" / "quant_cache.pkl").write_bytes(pickle.dumps([{"config": []}]))
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--multi_chkpt", "nowhere.pt"), "nowhere.pt: no such multiquantizer; make it with"),
        (("--multi_chkpt", "{bad}/damaged.pt"), "damaged.pt: not a readable checkpoint"),
        (("--q_config", "nowhere.pkl"), "nowhere.pkl: no such file"),
        (("--q_config", "uniform:mse-4", "uniform:mse-9"), "uniform:mse-9: unknown method 'mse-9'"),
        (("--q_config", "{bad}/foreign.pkl"), "1 keys are not of this denoiser, first model.conv_in"),
        (("--q_config", "{bad}/short.pkl"), "short.pkl: 1 of 201 keys are missing"),
        (("--q_config", "{bad}/unknown.pkl"), "unknown method 'mse-9' for model."),
        (("--q_config", "{bad}/untied.pkl"), "is mse-3, but it shares the weights of"),
        (("--q_config", "{labels}/quant_cache.pkl"), "add :best"),
        (("--reference", "nowhere"), "nowhere: no such folder"),
        (("--reference", "{root}/bops"), "bops: holds no images"),
        (("--steps", "2000"), "--steps 2000: embedded has 1000 noise levels"),
        (("--res", "512"), "--res 512: embedded makes images of 64 px only"),
        (("--outdir", "{root}/README.md"), "README.md"),
        (("--outdir", "{bad}/labels"), "quant_cache.pkl: not a list of labelled"),
    ],
)
def test_labelling(flags, message, labels, mq, bad_files, tmp_path, run_script, nothing_is_loaded):
    given = [str(flag).format(labels=labels, root=ROOT, bad=bad_files) for flag in flags]
    defaults = (*EVAL, "--num_archs", 1, "--multi_chkpt", mq, "--outdir", tmp_path / "out")
    code, printed = run_script(eval_random, "dit", *defaults, *given)
    assert code == 2 and message in printed
    assert printed.strip().splitlines()[-1].startswith("error:") and "Traceback" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompts", "nowhere.json"), "nowhere.json: no such file"),
        (("--clip_score", "--clip_model", "{root}/bops"), "bops: this folder is not a CLIPModel"),
        (("--res", "100"), "--res: 100 is not a multiple of 16"),
    ],
)
def test_labelling_by_prompts(flags, message, tiny_mq, tmp_path, run_script, nothing_is_loaded):
    given = [str(flag).format(root=ROOT) for flag in flags]
    defaults = (*EVAL, "--num_archs", 1, "--multi_chkpt", tiny_mq("pixart_alpha"), "--outdir", tmp_path / "out")
    code, printed = run_script(eval_random, "pixart_alpha", *defaults, *given)
    assert code == 2 and message in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("stage", "flags", "message"),
    [
        (build_config, ("--multi_chkpt", "nowhere.pt"), "nowhere.pt: no such multiquantizer"),
        (build_config, ("--multi_chkpt", "{bad}/damaged.pt"), "damaged.pt: not a readable checkpoint"),
        (build_config, ("--multi_chkpt", "{bad}/part.pt"), "part.pt: 1 of 201 layers are missing"),
        (build_config, ("--avg_bits", "2"), "--avg_bits 2: the smallest configuration of dit has"),
        (build_config, ("--sensitivity", "{bad}/damaged.pt"), "damaged.pt: holds no sensitivities, or is damaged"),
        (build_config, ("--sensitivity", "{bad}/exact"), "was measured with probe exact, not sketch; give another"),
        (build_config, ("--sensitivity", "{bad}"), "{bad}: is a folder"),
        (build_config, ("--output", "{bad}"), "{bad}: is a folder"),
        (build_config, ("--output", "{root}/README.md/c.pkl"), "c.pkl: cannot be written"),
        (build_config, ("--steps", "2000"), "--steps 2000: embedded has 1000 noise levels"),
        (plot_insights, ("--outdir", "{root}/README.md"), "README.md/ranking.csv: cannot be written"),
        (plot_insights, ("--q_config", "{bad}/foreign.pkl"), "1 keys are not of this denoiser, first model.conv_in"),
        (plot_insights, ("--q_config", ""), "no such file"),
    ],
)
def test_without_labels(stage, flags, message, mq, bad_files, tmp_path, run_script, nothing_is_loaded):
    given = [str(flag).format(root=ROOT, bad=bad_files) for flag in flags]
    defaults = ("--family", "dit", *NONE, "--multi_chkpt", mq, "--sensitivity", tmp_path / "said.pt")
    defaults += ("--avg_bits", 4) + (("--output", tmp_path / "c.pkl") if stage is build_config else ())
    code, printed = run_script(stage, None, *defaults, *given)
    assert code == 2 and message.format(bad=bad_files) in printed and printed.count("\n") == 1


def test_without_labels_by_prompts(tiny_mq, run_script, nothing_is_loaded):
    flags = ("--family", "pixart_alpha", *NONE, "--multi_chkpt", tiny_mq("pixart_alpha"), "--avg_bits", 4)
    code, printed = run_script(build_config, None, *flags, "--prompts", "nowhere.txt")
    assert code == 2 and "nowhere.txt: no such file" in printed and printed.count("\n") == 1


FLAGS = ["prompts_key", "hand_over", "lora_key", "scheduler", "multiquantizer_key", "guidance", "directions", "methods"]


@pytest.mark.parametrize("flag", FLAGS)
def test_sensitivities_measured_otherwise_are_refused(tmp_path, flag):
    args = Flags(dict.fromkeys(score_sources.FLAGS, 1) | {"probe": "sketch", "directions": 3})
    settings, path = score_sources.flags_of(args) | probe_settings(args, ["mse-4", "mse-3"]), tmp_path / "said"
    with RecordFile(path, settings) as file:
        file.add(["a"], {"changes": torch.zeros(6)})
    assert RecordFile(path, settings).names == [["a"]]
    with pytest.raises(InputError, match=f"was measured with {flag} .*, not 2; give another --sensitivity"):
        RecordFile(path, settings | {flag: 2})


def test_a_file_that_can_be_written(tmp_path):
    check_writable(tmp_path / "new" / "file.pkl")
    assert list((tmp_path / "new").iterdir()) == []


def test_configurations_that_load(tmp_path, load_tiny):
    """By the entries alone the same are let through as by the denoiser's slots: ties may be left out, or agree."""
    _, slots, entries = load_tiny("dit")
    entries = by_file_key(entries, slots)
    for name, left_out in (("all.pkl", ()), ("free.pkl", [key for key, slot in slots.items() if slot.tie != key])):
        save_pickle({slot.file_key: "mse-4" for key, slot in slots.items() if key not in left_out}, tmp_path / name)
        q_config.load(tmp_path / name, slots)
        q_config.check(tmp_path / name, entries, FAMILIES["dit"])
        q_config.check(tmp_path / name, None, FAMILIES["dit"])
    q_config.check("uniform:kmeans-3", entries, FAMILIES["dit"])


def test_entries_of_a_file(tiny_mq, tmp_path):
    """Read without the denoiser they are those that are read with it."""
    read = multiquantizer.read(tiny_mq("dit"), "dit")
    model = multiquantizer.load(tiny_mq("dit"), tiny_model("dit"))
    assert list(read) == [model.slots[key].file_key for key in model.entries]
    torch.save({"model.a.weight_quantizer.quant_params.mse-4": torch.ones(2)}, tmp_path / "published.pt")
    assert multiquantizer.read(tmp_path / "published.pt", "dit") is None


@pytest.fixture
def lean_mq(tmp_path):
    """Path of a multiquantizer of a tiny DiT that was fitted with mse-8 and nothing else."""
    model = tiny_model("dit")
    model.fit(["mse-8"])
    multiquantizer.save(model, tmp_path / "lean.pt")
    return tmp_path / "lean.pt"


@pytest.mark.parametrize("flags", [(), ("--q_config", "uniform:mse-4")])
def test_random_configurations_need_the_search_space(lean_mq, tmp_path, flags, run_script, nothing_is_loaded):
    code, printed = run_script(eval_random, "dit", *EVAL, "--multi_chkpt", lean_mq, "--outdir", tmp_path / "out", *flags)
    assert code == 2 and "the multiquantizer has only mse-8, not mse-4; " in printed and printed.count("\n") == 1
