"""The Slurm examples, with Slurm acted by two small programs: which node gets which variables and commands."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from tests.support.paths import ROOT

SLURM = ROOT / "scripts" / "slurm"

#: starts the command once per node, one after the other, as srun does at the same time
_SRUN = r"""#!/usr/bin/env bash
echo "srun $*" | sed 's/ bash -c.*//' >> "$SRUN_LOG"
nodes=1
while [[ "$1" == --* ]]; do [[ "$1" == --nodes=* ]] && nodes="${1#--nodes=}"; shift; done
for ((node = 0; node < nodes; node++)); do SLURM_NODEID=$node SLURM_PROCID=$node "$@" || exit; done
"""
_SCONTROL = """#!/usr/bin/env bash
[[ "$*" == "show hostnames gpu[07-08]" ]] && printf 'gpu07\\ngpu08\\n'
"""
_SHOW = """
echo "rank=$MACHINE_RANK of $NUM_MACHINES x $NUM_PROCESSES ip=$MAIN_PROCESS_IP port=$MAIN_PROCESS_PORT out=$OUTPUT: $*"
"""
JOB = {
    "SLURM_JOB_ID": "123456", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_GPUS_ON_NODE": "8",
    "SLURM_CPUS_PER_TASK": "32", "SLURM_SUBMIT_DIR": str(ROOT),
}  # fmt: skip


@pytest.fixture
def submit(tmp_path):
    """submit(file, *arguments, **variables): the batch file as Slurm runs it, a copy in another folder."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, text in (("srun", _SRUN), ("scontrol", _SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    show = tmp_path / "show.sh"
    show.write_text(_SHOW)

    def run(file: str, *arguments: str, **variables: str | None) -> subprocess.CompletedProcess:
        copy = shutil.copy(SLURM / file, tmp_path / "slurm_script")
        clean = {k: v for k, v in os.environ.items() if not re.match("SLURM|NUM_|MAIN_|MACHINE|OUTPUT|GPUS_|ROOT", k)}
        environment = {**clean, **JOB, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHON": sys.executable}
        environment |= {"SRUN_LOG": str(tmp_path / "srun.log"), **variables}
        environment = {k: v for k, v in environment.items() if v is not None}
        arguments = tuple(a.replace("SHOW", str(show)) for a in arguments)
        return subprocess.run(["bash", copy, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path)

    run.srun = lambda: (tmp_path / "srun.log").read_text().splitlines()
    return run


def test_every_node_gets_its_rank_and_the_same_of_all_else(submit) -> None:
    done = submit("eval.sbatch", "SHOW", "--limit", "a b")
    assert done.returncode == 0, done.stderr
    same = f"of 2 x 8 ip=gpu07 port={20000 + 123456 % 20000} out={ROOT}/outputs/slurm_123456: --limit a b"
    assert done.stdout.splitlines() == [f"rank=0 {same}", f"rank=1 {same}"]
    (srun,) = submit.srun()
    wanted = "--nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 --cpus-per-task=32"
    assert srun == f"srun {wanted}"


def test_what_is_set_stays(submit) -> None:
    given = {"NUM_PROCESSES": "3", "MAIN_PROCESS_IP": "10.1.1.1", "MAIN_PROCESS_PORT": "29999", "OUTPUT": "/data/x"}
    done = submit("eval.sbatch", "SHOW", **given)
    assert done.stdout.splitlines()[1] == "rank=1 of 2 x 3 ip=10.1.1.1 port=29999 out=/data/x: "


def test_large_models_and_one_node(submit) -> None:
    done = submit("eval.sbatch", "SHOW", GPUS_PER_MODEL="4", SLURM_JOB_NUM_NODES="1")
    assert done.stdout.startswith("rank=0 of 1 x 2 ip= port=")
    without = submit("eval.sbatch", "SHOW", SLURM_GPUS_ON_NODE=None)  # the scripts then count GPUs themselves
    assert without.returncode == 0 and without.stdout.startswith("rank=0 of 2 x  ip=gpu07")


@pytest.mark.parametrize(
    ("arguments", "variables", "says"),
    [
        ((), {}, "name a script"),
        (("scripts/eval/no_such.sh",), {}, "there is no script scripts/eval/no_such.sh"),
        (("SHOW",), {"GPUS_PER_MODEL": "3"}, "GPUS_PER_MODEL=3 does not divide the 8 GPUs of a node"),
        (("SHOW",), {"SLURM_JOB_ID": None}, "not inside a Slurm job"),
        (("SHOW",), {"SLURM_JOB_NODELIST": "other"}, "names no node"),
        (("SHOW",), {"SLURM_SUBMIT_DIR": "/"}, "submit from the project's folder, not /"),
    ],
)
def test_what_is_wrong_is_said(arguments, variables, says, submit) -> None:
    done = submit("eval.sbatch", *arguments, **variables)
    assert done.returncode != 0 and says in done.stderr and done.stdout == ""


def test_a_failing_node_fails_the_job(submit, tmp_path) -> None:
    (tmp_path / "fails.sh").write_text("exit 7\n")
    assert submit("eval.sbatch", str(tmp_path / "fails.sh")).returncode == 7


@pytest.mark.slow
def test_commands_of_an_evaluation(submit) -> None:
    pytest.importorskip("lmms_eval_accelerate")
    given = {"PRETRAINED": "org/model", "TASKS": "videomme", "DRY_RUN": "1"}
    done = submit("eval.sbatch", "scripts/eval/fastvid_llava_ov.sh", **given)
    assert done.returncode == 0, done.stderr
    together = [line for line in done.stdout.splitlines() if line.startswith("# all of them")]
    assert len(together) == 2 and "fastvid" in done.stdout and str(ROOT / "outputs" / "slurm_123456") in done.stdout
    for rank, line in enumerate(together):
        # torchrun here, where there is no GPU; `accelerate launch` on a node with some
        assert re.search(rf"--(node|machine)_rank {rank}\b", line), line
        assert re.search(r"--(nproc_per_node 8|num_processes 16)\b", line) and "gpu07" in line and "23456" in line


@pytest.mark.slow
def test_commands_of_a_table(submit) -> None:
    pytest.importorskip("lmms_eval_accelerate")
    if not (ROOT / "scripts" / "reproduce.sh").is_file():
        pytest.skip("scripts/reproduce.sh is not there")
    done = submit("reproduce.sbatch", "fastvid", "--dry-run")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        assert re.search(rf"--(node|machine)_rank {rank}\b", done.stdout), done.stdout[-2000:]
    assert "gpu07" in done.stdout


def test_examples_of_a_table_can_be_run(monkeypatch, capsys, tmp_path) -> None:
    """The commands in the batch file's own words, without a judge's key."""
    from lmms_eval_accelerate.reproduce import cli

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    text = (SLURM / "reproduce.sbatch").read_text()
    examples = re.findall(r"^#   sbatch .*reproduce\.sbatch (.*)$", text, re.MULTILINE)
    assert len(examples) == 2
    for example in examples:
        assert cli.main([*example.split(), "--dry-run"]) == 0, capsys.readouterr().err


def test_batch_files_ask_for_what_they_say() -> None:
    for file in SLURM.glob("*.sbatch"):
        asked = re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", file.read_text(), re.MULTILINE)
        wanted = {"nodes": "2", "gpus-per-node": "8", "ntasks-per-node": "1"}
        assert wanted.items() <= dict(asked).items()
    if shutil.which("shellcheck"):
        files = [str(file) for file in sorted(SLURM.iterdir())]
        checked = subprocess.run(["shellcheck", "-x", *files], cwd=ROOT, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout
