import json
import math
import statistics
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from torch import nn

import fewbits
from fewbits import QuantScheme, speed
from fewbits.errors import InputError, ResourceError
from fewbits.memory import watch_memory
from fewbits.speed import (
    compare_speed,
    count_kernels,
    measure_resident,
    measure_size,
    measure_speed,
    tensor_bytes,
)
from models import tiny_checkpoint


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "llama"
    tiny_checkpoint(folder, "llama")
    return folder


def test_tensor_bytes_count_shared_storage_once():
    module = nn.Sequential(nn.Linear(8, 4, bias=False), nn.Linear(8, 4, bias=False))
    assert tensor_bytes(module) == 2 * 8 * 4 * 4
    module[1].weight = module[0].weight
    assert tensor_bytes(module) == 8 * 4 * 4


def test_size_counts_whole_files_per_parameter_of_the_float_model(model, tmp_path):
    float_size = measure_size(model)
    file_bytes = (model / "model.safetensors").stat().st_size
    assert float_size.bits_per_weight == 8 * file_bytes / float_size.parameters
    assert 16 < float_size.bits_per_weight < 17  # bfloat16 and a header
    fewbits.quantize(model, tmp_path / "out", scheme=QuantScheme(4, "group", 32))
    size = measure_size(tmp_path / "out")
    assert size.parameters == float_size.parameters
    assert size.weight_bytes == (tmp_path / "out/model.safetensors").stat().st_size
    assert size.method == "rtn w4-g32"


def test_speed_is_positive_and_says_what_ran(model):
    network = fewbits.load(model)
    fewbits.quantize_(network, QuantScheme(4, "group", 32), overrides=(("*.o_proj", None),))
    speed = measure_speed(network, prompt=8, new_tokens=2, repeats=1)
    assert speed.prefill > 0
    assert speed.decode > 0
    assert (speed.prompt, speed.new_tokens) == (8, 2)
    floats = sum("weight" in m._parameters for m in network.modules() if isinstance(m, nn.Linear))
    assert floats == 3  # what was left in float, and the head
    assert speed.kernels == count_kernels(network)
    assert speed.kernels["float"] == floats
    assert speed.tensor_bytes == tensor_bytes(network)


def test_the_prompt_is_shortened_to_the_context(model):
    network = fewbits.load(model)
    context = network.config.max_position_embeddings
    speed = measure_speed(network, prompt=10 * context, new_tokens=4, repeats=1)
    assert speed.prompt + speed.new_tokens == context


def test_a_context_of_one_token_is_refused(model):
    network = fewbits.load(model)
    network.config.max_position_embeddings = 1
    with pytest.raises(InputError, match="too short"):
        measure_speed(network)


# -- two models in turn: by a clock that only they advance ---------------------------------------------


class Clock:
    """Seconds that pass while a model runs; `slowness` may change from round to round."""

    def __init__(self):
        self.now, self.order, self.slowness = 0.0, [], lambda _: 1.0

    def perf_counter(self):
        return self.now


class Timed(nn.Module):
    """A model of known speed: seconds per pass over a prompt, and per single token."""

    device = torch.device("cpu")

    def __init__(self, name, clock, prefill_s, step_s):
        super().__init__()
        self.name, self.clock, self.prefill_s, self.step_s, self.rounds = (
            name,
            clock,
            prefill_s,
            step_s,
            0,
        )
        self.config = SimpleNamespace(vocab_size=11, max_position_embeddings=64)
        self.config.get_text_config = lambda: self.config

    def forward(self, ids, use_cache, cache=None):
        first = cache is None
        if first:
            self.clock.order.append(self.name)
            self.rounds += 1
        seconds = self.prefill_s if first else self.step_s
        self.clock.now += seconds * self.clock.slowness(self.rounds)
        return SimpleNamespace(logits=torch.zeros(*ids.shape, 11), cache="cache")


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(speed, "time", clock)
    return clock


def test_rounds_of_two_models_alternate(clock):
    pair = Timed("model", clock, 0.2, 0.02), Timed("reference", clock, 0.1, 0.01)
    compare_speed(*pair, prompt=8, new_tokens=4, rounds=5)
    assert clock.order == ["model", "reference"] * 6  # the first of each warms up


def test_a_model_that_takes_twice_as_long_makes_half_the_tokens(clock):
    pair = Timed("model", clock, 0.2, 0.02), Timed("reference", clock, 0.1, 0.01)
    found = compare_speed(*pair, prompt=8, new_tokens=4, rounds=5)
    for ratio in (found.prefill, found.decode):
        assert ratio.value == pytest.approx(0.5)
        assert ratio.error == pytest.approx(0, abs=1e-9)
    assert (found.model.prefill, found.reference.prefill) == (pytest.approx(40), pytest.approx(80))
    assert (found.model.decode, found.reference.decode) == (pytest.approx(50), pytest.approx(100))
    back = compare_speed(*pair[::-1], prompt=8, new_tokens=4, rounds=5)
    assert back.decode.value == pytest.approx(2)
    json.dumps(found.to_json())


def test_what_slows_the_machine_down_slows_both(clock):
    """Each round twice as slow as the one before: speeds alone differ 16-fold, the ratio in nothing."""
    clock.slowness = lambda round_: 2.0**round_
    pair = Timed("model", clock, 0.1, 0.01), Timed("reference", clock, 0.2, 0.02)
    found = compare_speed(*pair, prompt=8, new_tokens=4, rounds=5)
    assert (found.prefill.value, found.decode.value) == (pytest.approx(2), pytest.approx(2))
    assert found.decode.error == pytest.approx(0, abs=1e-9)


def test_the_error_of_a_ratio_is_that_of_its_mean_over_rounds(clock):
    factors = [1.0, 1.0, 1.1, 0.9, 1.3, 0.8]  # the first round warms up
    model, reference = Timed("model", clock, 0.1, 0.01), Timed("reference", clock, 0.1, 0.01)
    clock.slowness = lambda _: factors[model.rounds - 1] if clock.order[-1] == "model" else 1.0
    found = compare_speed(model, reference, prompt=8, new_tokens=4, rounds=5)
    ratios = [1 / factor for factor in factors[1:]]
    for ratio in (found.prefill, found.decode):
        assert ratio.value == pytest.approx(statistics.mean(ratios))
        assert ratio.error == pytest.approx(statistics.stdev(ratios) / math.sqrt(5))


def test_a_model_against_itself_is_timed_as_two(model):
    network = fewbits.load(model)
    found = compare_speed(network, network, prompt=8, new_tokens=2, rounds=2)
    for ratio in (found.prefill, found.decode):
        assert 0 < ratio.value < math.inf
        assert ratio.error >= 0
    assert found.model.kernels == found.reference.kernels


# -- memory --------------------------------------------------------------------------------------------


def test_memory_is_watched_while_a_block_runs():
    with watch_memory() as memory:
        block = torch.ones(2**26, dtype=torch.uint8)  # 64 MB, every page written
    # Half of it, as pages that were free before may be taken.
    assert memory.peak - memory.before > block.nbytes / 2 or not memory.anonymous


@pytest.mark.slow
def test_resident_memory_is_that_of_the_weights(model, tmp_path):
    """Two checkpoints of one architecture: what they need beyond their weights is the same code."""
    changes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "head_dim": 64}
    large = tiny_checkpoint(tmp_path / "large", "llama", **changes)
    small_bytes, large_bytes = (measure_resident(folder) for folder in (model, large))
    if small_bytes is None:
        pytest.skip("this system does not tell the memory of a process")
    with safe_open(large / "model.safetensors", "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    weights = sum(2 * math.prod(shape) for shape in shapes)  # bfloat16; the embedding is 96 rows
    size = (large / "model.safetensors").stat().st_size
    print({"weights": weights, "file": size, "large": large_bytes, "small": small_bytes})
    # One pass reads every matrix. At most it is there twice: as the file's pages, and as PyTorch's own.
    # What the small one takes is code that loading runs, the same for both; a tenth for what the
    # allocator keeps of states and of rounding to pages.
    assert 0.9 * weights < large_bytes
    assert large_bytes - small_bytes < 2.1 * size
    int4 = tmp_path / "int4"
    fewbits.quantize(large, int4, scheme=QuantScheme(4, "group", 32))
    codes = (int4 / "model.safetensors").stat().st_size
    packed_bytes = measure_resident(int4, torch.bfloat16)
    print({"codes": codes, "packed": packed_bytes})
    assert 0.9 * codes < packed_bytes
    # Twice, too: what kernels made of the codes, and the pages that the codes were read from.
    made = tensor_bytes(fewbits.load(int4, dtype=torch.bfloat16))
    assert packed_bytes - small_bytes < 1.1 * (codes + made)
    assert packed_bytes < large_bytes


def test_a_process_that_fails_says_why(tmp_path):
    with pytest.raises(ResourceError, match=r"no config\.json"):
        measure_resident(tmp_path)
