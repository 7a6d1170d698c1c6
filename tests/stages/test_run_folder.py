"""A run's folder: settings that read back as they were given, and one run at a time on any file system."""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from omegaconf import OmegaConf

from errors import InputError
from stages import infer, run_folder, run_lock
from stages.run_folder import only_run_in, read_settings, save_settings

TEXTS = [
    "a ${season} landscape", "???", "${oc.env:HOME}", "null", "12", "a: b", "- x", "😀", "a\nnew\n\nline ", "", " lead", "~",
    "1e3", "0x1f", "yes", "on", ".nan", "2020-01-01", "1:30", "#c", "%d", "&a *b", "!tag", "`", "{a}", "[1]", ">", "|", "=",
    "a #b", "\t", "a\x85b", "\u2028", "\x7f", "\x01", "\ufeffx", "a \n b", "\r\n", "c:\\x", "it's", '"q"', "...", "---",
    "<<", "x " * 200, "漢字", "\\${x}", "caf\udce9",
]  # fmt: skip


def test_settings_are_data(tmp_path):
    """What YAML or OmegaConf would take for something else reads back as the text that it is."""
    path = tmp_path / "sampling_config.yaml"
    flags = {
        "seed": 42,
        "prompt": TEXTS,
        "again": TEXTS,
        "folder": Path("a/${b}"),
        "eta": 1e-05,
        "guidance": 7.5,
        "res": None,
    }
    save_settings(flags, path)
    settings = read_settings(path)
    assert settings == flags | {"folder": "a/${b}"}
    assert settings.seed == 42 and settings.get("res", 1) is None and settings.get("none") is None
    with pytest.raises(AttributeError):
        _ = settings.none


@pytest.mark.parametrize("text", ["12", "1e3", "null", "a: b", "plain", "a 😀\nb"])
def test_settings_are_read_by_other_readers(tmp_path, text):
    save_settings({"seed": 1, "prompt": [text], "pack": True}, tmp_path / "x.yaml")
    assert OmegaConf.load(tmp_path / "x.yaml") == {"seed": 1, "prompt": [text], "pack": True}


def test_settings_of_former_versions_are_read(tmp_path):
    path = tmp_path / "x.yaml"
    flags = {"seed": 42, "model_id": "embedded", "prompts": None, "a_l": 0.0, "eta": 1e-05, "q_config": ["1e3", "yes"]}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(flags)))
    assert read_settings(path) == flags


def test_infer_keeps_its_prompts_as_they_are_and_before_anything_is_drawn(tmp_path, run_script, embedded_mq, monkeypatch):
    """Settings stand in the folder when the first image is asked for."""
    seen = []

    def draw(pictures, *_):
        seen.append((pictures.prompts, read_settings(pictures.folder.parent / "sampling_config.yaml").prompt))
        raise InputError("enough")

    monkeypatch.setattr(infer.Pictures, "draw", draw)
    prompts = ["a ${season} landscape", "???", "null", "- x"]
    flags = ("--model_id", "embedded", "--multi_chkpt", embedded_mq("pixart_alpha"), "--q_config", "uniform:mse-4")
    code, printed = run_script(infer, "pixart_alpha", *flags, "--outdir", tmp_path, "--prompt", *prompts)
    assert code == 2 and printed.strip().endswith("error: enough") and seen == [(prompts, prompts)]


@pytest.fixture(params=[errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL, None])
def no_flock(request, monkeypatch):
    """A file system without locks, which says so in one of several ways; None is a system without."""
    if request.param is None:
        monkeypatch.setattr(run_lock, "fcntl", None)
    else:
        monkeypatch.setattr(run_lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(request.param, "no locks")))


@pytest.fixture
def by_file(monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)


def write_holder(folder, **changes):
    this = psutil.Process()
    holder = {"process": this.pid, "host": socket.gethostname(), "started": this.create_time()} | changes
    (folder / "run.pid").write_text(json.dumps(holder))


def test_a_run_whose_folder_is_deleted_meanwhile_has_not_gone_well(tmp_path):
    with pytest.raises(InputError, match="a: was deleted, moved or replaced"), only_run_in(tmp_path / "a"):
        shutil.rmtree(tmp_path / "a")
        (tmp_path / "a").mkdir()  # as writing to it does


def test_without_locks_a_file_tells_who_is_at_work(tmp_path, no_flock, caplog):
    with only_run_in(tmp_path):
        assert [record.levelname for record in caplog.records] == ["WARNING"] and "cannot be locked" in caplog.text
        with pytest.raises(InputError, match=rf"process {os.getpid()} on .* is at work here; give another --outdir$"):
            only_run_in(tmp_path).__enter__()
    assert not (tmp_path / "run.pid").exists()
    with only_run_in(tmp_path):
        pass


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EACCES])
def test_a_lock_that_another_holds_is_no_lack_of_locks(tmp_path, monkeypatch, code):
    (tmp_path / "run.lock").write_text("process 7 on far")
    monkeypatch.setattr(run_lock.fcntl, "flock", lambda *_: (_ for _ in ()).throw(OSError(code, "held")))
    with pytest.raises(InputError, match="process 7 on far is at work"), only_run_in(tmp_path):
        pass


def test_what_a_run_raises_is_not_taken_for_a_lack_of_locks(tmp_path):
    with pytest.raises(OSError, match="disk"), only_run_in(tmp_path):
        raise OSError(errno.ENOSYS, "disk")
    assert not (tmp_path / "run.pid").exists()


def test_a_process_that_is_gone_holds_nothing(tmp_path, by_file):
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        pass
    write_holder(tmp_path, process=ended.pid)
    with only_run_in(tmp_path):
        assert json.loads((tmp_path / "run.pid").read_text())["process"] == os.getpid()
    assert [path.name for path in tmp_path.iterdir()] == ["run.lock"]


def test_a_process_that_nobody_has_waited_for_holds_nothing(tmp_path, by_file):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        write_holder(tmp_path, process=process.pid, started=psutil.Process(process.pid).create_time())
        with pytest.raises(InputError, match=f"process {process.pid} on"), only_run_in(tmp_path):
            pass
        process.stdin.close()
        while psutil.Process(process.pid).status() != psutil.STATUS_ZOMBIE:
            pass
        with only_run_in(tmp_path):
            pass


def test_another_process_of_the_same_number_holds_nothing(tmp_path, by_file):
    write_holder(tmp_path, started=psutil.Process().create_time() - 3600)
    with only_run_in(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"process": "x", "host": "y", "started": 0}', "\x00\x00"])
def test_a_file_that_was_cut_off_holds_nothing(tmp_path, by_file, content):
    (tmp_path / "run.pid").write_text(content)
    with only_run_in(tmp_path):
        pass


def test_a_process_of_another_machine_cannot_be_looked_up(tmp_path, by_file):
    write_holder(tmp_path, host="far", process=1)
    with pytest.raises(InputError, match=r"process 1 on far is at work here.*; if it is not, delete .*run\.pid$"):
        only_run_in(tmp_path).__enter__()
    assert (tmp_path / "run.pid").exists()


def test_a_left_file_that_another_takes_over_first(tmp_path, by_file, monkeypatch):
    """Between reading the file of a process that is gone and removing it, another run puts its own there."""
    write_holder(tmp_path, started=0)
    look_up = run_lock._may_live

    def too_late(holder):
        write_holder(tmp_path)
        monkeypatch.setattr(run_lock, "_may_live", look_up)
        return look_up(holder)

    monkeypatch.setattr(run_lock, "_may_live", too_late)
    with pytest.raises(InputError, match="is at work"), only_run_in(tmp_path):
        pass
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.lock", "run.pid"]


def test_the_log_takes_any_sign(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_folder.log, "propagate", False)  # a report with such a sign cannot be sent to another process
    try:
        run_folder.start_log(tmp_path)
        run_folder.log.info("a 😀 caf\udce9")
    finally:
        for handler in list(run_folder.log.handlers):
            handler.close()
            run_folder.log.removeHandler(handler)
    capsys.readouterr()
    assert "a 😀 caf\\udce9" in (tmp_path / "run.log").read_text(encoding="utf-8")
