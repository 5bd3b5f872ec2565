"""The listing: every model, its columns, and no waiting for torch."""

import json
import subprocess
import sys

from minicpm_lite import list_configs
from minicpm_lite.cli import main


def test_a_table(capsys):
    assert main(["models"]) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.strip()]
    assert [row.split()[0] for row in rows[1:]] == list_configs()
    (row,) = (row for row in rows if "minicpm-moe-8x2b" in row)
    assert row.split()[1:4] == ["13,873,291,776", "13,590,468,864", "4,318,142,976"]
    assert {len(row) for row in rows} == {len(rows[0])}, "the columns stand under each other"
    assert len(rows[0]) <= 80 and "…" not in rows[0]


def test_for_programs(capsys):
    assert main(["models", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in rows] == list_configs()
    (row,) = (row for row in rows if row["name"] == "minicpm-2.4b")
    assert row == {"name": "minicpm-2.4b", "parameters": 2724880896, "parameters_without_tables": 2442057984,
                   "parameters_of_a_token": 2724880896, "layers": 40, "width": 2304, "vocabulary": 122753,
                   "context": 4096}  # fmt: skip


def test_it_does_not_wait_for_torch():
    script = "import sys; from minicpm_lite.cli import main; main(['models']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
