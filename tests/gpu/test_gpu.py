"""The same path on a CUDA device, in half precision. Skipped where there is none."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from vision_service.backends._detection import select_each, select_together  # noqa: E402
from vision_service.backends.table import create_backend  # noqa: E402
from vision_service.config.settings import EMBEDDED_MODELS  # noqa: E402
from vision_service.engine.build import local_pipeline  # noqa: E402
from vision_service.engine.loaded import Prepared  # noqa: E402
from vision_service.errors import DeviceOutOfMemory  # noqa: E402
from vision_service.imaging.decode import decode_image  # noqa: E402
from vision_service.imaging.preprocess import preprocess  # noqa: E402
from vision_service.runtimes import CannotCompile, Execution, Workload, create_runtime  # noqa: E402
from vision_service.types import Params, Task  # noqa: E402
from vision_service.weights.manifest import find_model  # noqa: E402

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(scope="module")
def gpu():
    with local_pipeline(EMBEDDED_MODELS, device="cuda:0") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def cpu():
    with local_pipeline(EMBEDDED_MODELS, device="cpu") as pipeline:
        yield pipeline


def test_models_run_there_in_half_precision(gpu):
    for host in gpu.catalog.hosts():
        info = gpu.catalog.info(host)
        assert (info.device, info.precision) == ("cuda:0", "fp16")


def test_answers_are_those_of_the_cpu(gpu, cpu, samples):
    for name, data in samples.items():
        one, other = (p.predict(data, task=Task.CLASSIFY).prediction for p in (gpu, cpu))
        assert one.class_ids[0] == other.class_ids[0], name
        np.testing.assert_allclose(one.scores, other.scores, atol=0.02)

        one, other = (p.predict(data, task=Task.DETECT).prediction for p in (gpu, cpu))
        assert one.class_names[0] == other.class_names[0], name
        np.testing.assert_allclose(one.boxes_xyxy[0], other.boxes_xyxy[0], atol=3)

        one, other = (p.predict(data, task=Task.SEGMENT).prediction for p in (gpu, cpu))
        assert np.mean(one.class_map != other.class_map) < 0.01, name


def test_images_do_not_mix_in_a_batch(gpu, samples):
    data = list(samples.values())
    futures = [gpu.submit(data[i % len(data)], task=Task.DETECT) for i in range(48)]
    results = [future.result(60) for future in futures]
    assert max(result.timings.batch_size for result in results) > 1
    for i, result in enumerate(results):
        np.testing.assert_allclose(
            result.prediction.scores, results[i % len(data)].prediction.scores, atol=0.01, err_msg=str(i)
        )


def test_out_of_memory_is_named_and_the_model_goes_on(gpu):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + 200 * 2**20) / total, 0)
    try:
        with pytest.raises(DeviceOutOfMemory, match="does not fit"):
            gpu.predict(np.zeros((1000, 1000, 3), np.uint8), task=Task.TRANSLATE)
        assert gpu.predict(np.zeros((64, 64, 3), np.uint8), task=Task.TRANSLATE).prediction.image.shape == (128, 128, 3)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, 0)


def test_batches_are_put_together_in_page_locked_memory_that_stays(gpu, samples):
    model = gpu.catalog.find("mobilenet_v2")._model
    image = preprocess(decode_image(samples["coffee"]), model.spec.preprocess)
    one = Prepared(*image, model.spec.params)
    batch = model._staging.stack([one.pixels] * 4)
    assert batch.is_pinned()
    assert model._staging.stack([one.pixels] * 2).data_ptr() == batch.data_ptr()
    black = Prepared(np.zeros_like(one.pixels), one.meta, one.params)
    outcomes = [model.forward([item] * 4) for item in (one, black, one)]  # each overwrites the last one's buffer
    first, other, again = (model.answers([one] * 4, outcome, 0)[0].prediction for outcome in outcomes)
    assert first.class_ids.tolist() == again.class_ids.tolist() != other.class_ids.tolist()


def test_suppression_there_keeps_what_it_keeps_on_the_cpu():
    rng = torch.Generator().manual_seed(0)
    corner = torch.rand(8, 500, 2, generator=rng) * 300
    boxes, scores = torch.cat((corner, corner + 60), dim=2), torch.rand(8, 500, 20, generator=rng)
    params = [Params(score_threshold=0.5 + 0.05 * i, iou_threshold=0.3 + 0.1 * (i % 3)) for i in range(8)]
    each, counts = select_each(boxes, scores, params)
    there, counts_there = select_together(boxes.cuda(), scores.cuda(), params)
    assert counts_there == counts
    np.testing.assert_allclose(there, each)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("runtime", ["torch", "torch_compile", "torch_cuda_graphs", "tensorrt"])
def test_runtimes_agree_with_the_cpu_at_every_batch_size(runtime, precision, tmp_path):
    if runtime == "tensorrt":
        pytest.importorskip("torch_tensorrt")
    spec = find_model("mobilenet_v2", [])
    images = torch.randint(0, 256, (8, 224, 224, 3), dtype=torch.uint8, generator=torch.manual_seed(0))
    sizes_hw = torch.tensor([[224, 224]] * 8)
    with torch.inference_mode():
        expected = create_backend(spec).build().eval()(images, sizes_hw)[0]
    network = create_backend(spec).build()
    forward = create_runtime(runtime, torch.device("cuda:0"), Execution(1, tmp_path)).compile(
        network, Workload(images[:1], 8, described="test"), precision
    )
    bound = {"fp32": 1e-2, "bf16": 0.1, "fp16": 0.02}[precision] * expected.abs().max().item()  # TF32 rounds fp32
    for count in (1, 2, 3, 5, 8):
        (output,) = forward(images[:count], sizes_hw[:count])
        kept = output.clone()
        torch.testing.assert_close(output.float().cpu(), expected[:count], atol=bound, rtol=0)
        forward(images.flip(0)[:count], sizes_hw[:count])
        assert torch.equal(output, kept), "a later call wrote over it"


def test_inputs_of_several_sizes_are_not_recorded():
    network = create_backend(find_model("esrgan_slim_x2", [])).build()
    work = Workload(torch.zeros(1, 64, 64, 3, dtype=torch.uint8), any_size=True)
    with pytest.raises(CannotCompile, match="inputs differ in size"):
        create_runtime("torch_cuda_graphs", torch.device("cuda:0")).compile(network, work, "fp16")
