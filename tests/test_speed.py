import pytest
from torch import nn

import fewbits
from fewbits import QuantScheme
from fewbits.errors import InputError
from fewbits.speed import count_kernels, measure_size, measure_speed, tensor_bytes
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
