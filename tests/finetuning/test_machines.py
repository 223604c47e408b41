"""Unusual output folders, home folders, terminals and processes work, or are refused before training."""

import io
import subprocess
import sys
import tempfile
import time

import evaluate
import pytest
import torch
from filelock import FileLock
from tiny import FAST, load_script, save_bert, write_rows
from transformers import TrainingArguments

from hf_dualadam.finetuning import config, training
from hf_dualadam.finetuning.config import InputError, run_main
from hf_dualadam.finetuning.metrics import LocalMetric
from hf_dualadam.finetuning.training import LOCK, _Start, check_output_dir, check_writable, refuse_several_processes

ROWS = [{"sentence": f"the film is {word}", "label": index % 2} for index, word in enumerate("abcdefgh")]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """A command line of run_glue.py without its output folder."""
    folder = tmp_path_factory.mktemp("data")
    save_bert(folder / "bert")
    for split in ("train", "validation"):
        write_rows(folder / f"{split}.csv", ROWS)
    return ["--task_name", "sst2", "--data_dir", str(folder), "--model_name_or_path", str(folder / "bert"), *FAST]


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("below", ["", "new", "new/deeper"])
def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path, monkeypatch, below):
    def refuse(dir):
        raise PermissionError(13, "Permission denied")

    check_writable(tmp_path / below)
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(InputError, match=f"output_dir: cannot write to {tmp_path}: Permission denied"):
        check_writable(tmp_path / below)


@pytest.mark.parametrize("name", ["x" * 300, "new/" + "x" * 300, "x" * 300 + "/new", "new/\0", "new/../" + "x" * 300])
def test_a_name_that_the_system_refuses_is_one_line(tmp_path, name):
    with pytest.raises(InputError, match="output_dir: cannot write to .*(too long|null)"):
        check_writable(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("below", ["", "new"])
def test_a_link_to_nothing_is_refused(tmp_path, below):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    with pytest.raises(InputError, match="output_dir: .*link is a link to nothing"):
        check_writable(tmp_path / "link" / below)


@pytest.mark.parametrize("below", ["", "new", "new/deeper"])
def test_a_file_is_no_folder(tmp_path, below):
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match="output_dir: .*file is not a folder"):
        check_writable(tmp_path / "file" / below)


@pytest.mark.parametrize(
    "name", ["run_glue", "run_image_classification", "run_clm", "measure_sharpness", "escape_time"]
)
def test_every_script_looks_at_its_output_folder_first(tmp_path, capsys, name):
    if name == "run_clm":
        pytest.importorskip("trl")
    (tmp_path / "file").write_text("x")
    argv = {"measure_sharpness": [str(tmp_path), "--task_name", "sst2"]}.get(name, [])
    script = load_script(name)
    with pytest.raises(SystemExit) as caught:
        run_main(lambda: script.main([*argv, "--output_dir", str(tmp_path / "file" / "out")]))
    assert caught.value.code == 2
    assert "output_dir: " in (error := capsys.readouterr().err) and "is not a folder" in error


def test_one_process_writes_to_a_folder(tmp_path, options):
    out = tmp_path / "out"
    out.mkdir()
    run_glue = load_script("run_glue")
    with FileLock(out / LOCK, timeout=0):
        before = contents(out)
        for again in ([], ["--overwrite_output_dir"], ["--do_eval"]):
            with pytest.raises(InputError, match=f"another process is writing its run to {out}"):
                run_glue.main([*options, *again, "--output_dir", str(out)])
        args = TrainingArguments(str(out), report_to="none")
        with _Start(args, None) as start, pytest.raises(InputError, match="another process"):
            start.begin(args)  # the other process began while this one loaded its data
        assert contents(out) == before
    check_output_dir(args)
    with _Start(args, None) as start:
        start.begin(args)
        with pytest.raises(InputError, match="another process"):
            check_output_dir(args)
    check_output_dir(args)


def test_the_lock_dies_with_its_process(tmp_path):
    args = TrainingArguments(str(tmp_path), report_to="none")
    code = f"import filelock, time; lock = filelock.FileLock({str(tmp_path / LOCK)!r}); lock.acquire()\n"
    code += "print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(InputError, match="another process"):
            check_output_dir(args)
        other.kill()
        other.wait()
    for _ in range(50):  # the system releases the lock a moment later
        try:
            return check_output_dir(args)
        except InputError:
            time.sleep(0.1)
    raise AssertionError("still locked")


def test_metrics_need_no_home(monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/dev/null/metrics")
    assert LocalMetric(["accuracy"]).compute(predictions=[0, 1], references=[0, 0]) == {"accuracy": 0.5}


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_a_terminal_cannot_show_is_replaced(monkeypatch, encoding):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding=encoding))
    run_main(lambda: print("snow ☃ man"))
    sys.stdout.flush()
    assert written.getvalue() == b"snow ? man\n"


def failing(error):
    def fail(*args, **kwargs):
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [ValueError("bad value"), TypeError("bad"), ImportError("needs x"), RuntimeError("odd"), KeyError("key")]
)
def test_errors_of_input_before_the_first_step_are_one_line(tmp_path, error):
    with _Start(TrainingArguments(str(tmp_path), report_to="none"), None) as start:
        with pytest.raises(InputError, match=str(error)), start.refusals():
            failing(error)()
        start.begun = True
        with pytest.raises(type(error)) as caught, start.refusals():
            failing(error)()
        assert not isinstance(caught.value, InputError)


def test_errors_of_the_machine_keep_their_traceback(tmp_path):
    with _Start(TrainingArguments(str(tmp_path), report_to="none"), None) as start:
        for error in (torch.OutOfMemoryError("CUDA out of memory"), MemoryError()):
            with pytest.raises(type(error)), start.refusals():
                failing(error)()
        with pytest.raises(ValueError, match="process group") as caught, start.refusals():
            torch.distributed.barrier()  # like a collective operation whose other processes have ended
        assert not isinstance(caught.value, InputError)


def test_scripts_of_one_process_refuse_several(monkeypatch):
    refuse_several_processes("x.py")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="x.py: supports one process, but 2 were started"):
        refuse_several_processes("x.py")


def test_curves_and_cards_never_fail_a_run(tmp_path, options, monkeypatch, caplog):
    monkeypatch.setattr(training, "plot_learning_curves", failing(RuntimeError("no fonts")))
    monkeypatch.setattr(training.Trainer, "create_model_card", failing(OSError("no network")))
    metrics = load_script("run_glue").main([*options, "--output_dir", str(tmp_path / "out")]).metrics
    assert "learning_curves.png: skipped: RuntimeError: no fonts" in caplog.text
    assert "the model card: skipped: OSError: no network" in caplog.text
    assert metrics["total_flos"] > 0 and (tmp_path / "out" / "all_results.json").exists()


def test_one_process_of_a_job_speaks(monkeypatch):
    import logging

    ours = logging.getLogger("hf_dualadam")
    for rank, level in (("0", logging.INFO), ("1", logging.ERROR)):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(ours, "level", logging.NOTSET)
        config._show_information()
        assert ours.level == level
    ours.setLevel(logging.NOTSET)
