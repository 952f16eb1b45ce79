# SPDX-License-Identifier: BSD-3-Clause
"""No kernel touches a byte outside its operands, not even with the tail of a vector."""

from __future__ import annotations

from subprocesses import run_script


def test_no_access_outside_the_operands(isa):
    result = run_script("guard_pages.py", isa)
    assert result.returncode == 0, f"{result.stdout.splitlines()[-1:]}\n{result.stderr}"
    assert result.stdout.endswith("done\n")


def test_the_guard_itself_catches_one_byte():
    result = run_script("guard_pages.py", "prove-the-guard")
    assert result.stdout == "reading behind the end\n"
    assert result.returncode != 0
