import subprocess
import sys

import pytest
import torch

from sft.speed import PEAK_BF16_FLOPS, compiled_graphs, memory_gib, model_flops_utilisation, peak_flops
from tests.conftest import ROOT

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA A10", 125e12),
        ("NVIDIA GB300", 2500e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA B300 SXM6 AC", 2250e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA H800 PCIe", 756e12),
        ("NVIDIA H800", 989e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA A800-SXM4-80GB", 312e12),
        ("NVIDIA A40", 149.7e12),
        ("NVIDIA RTX 6000 Ada Generation", 364.2e12),
        ("NVIDIA RTX A6000", 154.8e12),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 503.8e12),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", None),
        ("NVIDIA GeForce RTX 5090", 209.5e12),
        ("NVIDIA GeForce RTX 4090 D", 147e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 3090 Ti", 80e12),
        ("AMD Instinct MI300X", 1307e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Quadro P1000", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_name_or_none(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", {GPU: name}.__getitem__)
    assert peak_flops(GPU) == peak


def test_every_name_of_the_table_finds_its_own_peak(monkeypatch: pytest.MonkeyPatch):
    for name, peak in PEAK_BF16_FLOPS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", {GPU: f"NVIDIA {name} 80GB"}.__getitem__)
        assert peak_flops(GPU) == peak, name


def test_the_cpu_has_no_peak():
    assert peak_flops(CPU) is None


def test_utilisation_is_the_share_of_what_all_devices_could_have_done():
    assert model_flops_utilisation(6e12, 2.0, world_size=3, peak=4e12) == 0.25
    assert model_flops_utilisation(6e12, 2.0, world_size=3, peak=None) is None
    assert model_flops_utilisation(6e12, 0.0, world_size=3, peak=4e12) is None


def test_the_memory_of_this_process_is_a_plausible_number_of_gib():
    assert 0.01 < memory_gib(CPU) < 100


def test_graphs_that_torch_compile_makes_are_counted_and_those_it_has_are_not():
    def double(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    compiled = torch.compile(double, backend="eager", dynamic=False)
    counts = []
    for size in (3, 3, 4, 3, 4):
        before = compiled_graphs()
        compiled(torch.ones(size))
        counts.append(compiled_graphs() - before)
    assert counts == [1, 0, 1, 0, 0]


def test_counting_graphs_does_not_import_the_compiler():
    program = "import sys, sft.speed; print(sft.speed.compiled_graphs(), 'torch._dynamo.utils' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "False"]
