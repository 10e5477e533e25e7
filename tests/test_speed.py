import pytest
import torch

from sft.speed import memory_gib, model_flops_utilisation, peak_flops

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
        ("NVIDIA A10G", None),
        ("NVIDIA RTX A1000 Laptop GPU", None),
        ("Quadro P1000", None),
    ],
)
def test_a_gpu_has_the_peak_of_its_own_name_or_none(monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None):
    monkeypatch.setattr(torch.cuda, "get_device_name", {GPU: name}.__getitem__)
    assert peak_flops(GPU) == peak


def test_the_cpu_has_no_peak():
    assert peak_flops(CPU) is None


def test_utilisation_is_the_share_of_what_all_devices_could_have_done():
    assert model_flops_utilisation(6e12, 2.0, world_size=3, peak=4e12) == 0.25
    assert model_flops_utilisation(6e12, 2.0, world_size=3, peak=None) is None
    assert model_flops_utilisation(6e12, 0.0, world_size=3, peak=4e12) is None


def test_the_memory_of_this_process_is_a_plausible_number_of_gib():
    assert 0.01 < memory_gib(CPU) < 100
