"""OpenVINO GenAI: its continuous batching pipeline, with prefix caching, on a GGUF file or an exported directory."""

from pathlib import Path
from time import perf_counter

from adapter import Generate, main

KV_CACHE_GB = 2


def open_model(model: str, threads: int) -> tuple[str, Generate]:
    import numpy as np
    import openvino
    import openvino_genai

    scheduling = openvino_genai.SchedulerConfig()
    scheduling.cache_size = KV_CACHE_GB
    scheduling.enable_prefix_caching = True
    settings = {"INFERENCE_NUM_THREADS": threads}
    pipeline = openvino_genai.ContinuousBatchingPipeline(Path(model), scheduling, "CPU", settings)
    asked = 0

    def generate(prompts: list[list[int]], shared: int, output_tokens: int) -> list[list[float]]:
        nonlocal asked
        length = openvino_genai.GenerationConfig(max_new_tokens=output_tokens, ignore_eos=True, do_sample=False)
        handles = []
        for prompt in prompts:
            handles.append(pipeline.add_request(asked, openvino.Tensor(np.array([prompt], np.int64)), length))
            asked += 1
        times: list[list[float]] = [[] for _ in prompts]
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = perf_counter()
            for handle, seen in zip(handles, times, strict=True):
                while handle.can_read():
                    seen += [now] * sum(len(output.generated_ids) for output in handle.read().values())
        return times

    return openvino_genai.get_version(), generate


if __name__ == "__main__":
    main(open_model)
