# SPDX-License-Identifier: BSD-3-Clause
"""Users see and force the instruction set; an unknown or unsupported name is an error, never a silent fallback."""

from __future__ import annotations

import pytest
import torch
from conftest import COMPILED_ISAS
from subprocesses import run_code

import fusedsep
from fusedsep import _C


def test_supported_isas_are_what_users_may_want():
    supported = fusedsep.supported_isas()
    assert supported[0] == "portable"
    assert "portable16" not in supported
    assert set(supported) < set(_C.supported_isas()) <= set(_C.compiled_isas())


def test_the_best_isa_is_in_use_by_default():
    result = run_code("import fusedsep; print(fusedsep.active_isa())", FUSEDSEP_ISA="")
    assert result.stdout.strip() == fusedsep.supported_isas()[-1], result.stderr


def test_use_isa_holds_until_the_next(isa):
    assert fusedsep.active_isa() == isa
    assert fusedsep.backend_info()["isa"] == isa
    fusedsep.use_isa("portable")
    assert fusedsep.active_isa() == "portable"


def test_use_isa_as_a_context_restores_the_former():
    fusedsep.use_isa("portable")
    with fusedsep.use_isa("portable16"):
        assert fusedsep.active_isa() == "portable16"
        with fusedsep.use_isa("portable"):
            assert fusedsep.active_isa() == "portable"
        assert fusedsep.active_isa() == "portable16"
    assert fusedsep.active_isa() == "portable"


def test_use_isa_restores_the_former_after_an_error():
    fusedsep.use_isa("portable")
    with pytest.raises(ZeroDivisionError), fusedsep.use_isa("portable16"):
        raise ZeroDivisionError
    assert fusedsep.active_isa() == "portable"


@pytest.mark.parametrize("name", ["sse9", "", "AVX2", "avx2 "])
def test_unknown_isa_is_an_error(name):
    before = fusedsep.active_isa()
    with pytest.raises(ValueError, match=f"isa must be one of portable, .*, got '{name}'"):
        fusedsep.use_isa(name)
    assert fusedsep.active_isa() == before


@pytest.mark.parametrize("name", [None, 512, b"avx2"])
def test_isa_must_be_a_string(name):
    with pytest.raises(TypeError, match="name must be a string such as 'avx2', got"):
        fusedsep.use_isa(name)


@pytest.mark.parametrize("name", COMPILED_ISAS)
def test_environment_variable_chooses(name):
    result = run_code("import fusedsep; print(fusedsep.active_isa())", FUSEDSEP_ISA=name)
    assert result.stdout.strip() == name, result.stderr


@pytest.mark.parametrize(
    "use",
    [
        "fusedsep.active_isa()",
        "fusedsep.backend_info()",
        "fusedsep.DepthwiseSeparableBlock(3, 4).eval()(torch.ones(1, 3, 5, 5))",
    ],
)
def test_unknown_name_in_the_environment_is_an_error_at_first_use(use):
    result = run_code(
        f"""
        import torch, fusedsep  # importing is no use
        try:
            {use}
        except ValueError as error:
            print(error)
        """,
        FUSEDSEP_ISA="sse9",
    )
    assert result.stdout.startswith("environment variable FUSEDSEP_ISA: isa must be one of portable, "), result.stderr
    assert result.stdout.endswith("got 'sse9'\n")


def test_backend_info():
    torch.set_num_threads(2)
    info = fusedsep.backend_info()
    assert info["version"] == fusedsep.__version__
    assert info["torch_version"] == torch.__version__
    assert info["isa"] == fusedsep.active_isa()
    assert info["supported_isas"] == fusedsep.supported_isas()
    assert info["threads"] == 2
    assert info["processors"] >= 1
    assert set(info["flags"]) == set(info["compiled_isas"]) >= set(info["supported_isas"])
    assert any(name in info["compiler"] for name in ("GCC", "Clang", "clang"))
    assert info["torch_built_with"].startswith("2.")


def test_kernels_are_compiled_with_the_flags_of_their_name():
    flags = fusedsep.backend_info()["flags"]
    for isa, text in flags.items():
        assert "-march=native" not in text
        assert "-ffast-math" not in text
        assert ("-mavx512f" in text) == (isa == "avx512")
        assert ("-mavx2" in text) == (isa in ("avx2", "avx512"))
