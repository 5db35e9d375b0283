"""CTranslate2: one static batch for all prompts, which is what it offers; a shared prefix is its static prompt, which it caches."""

import json
from pathlib import Path
from time import perf_counter

from adapter import Generate, main


def open_model(model: str, threads: int) -> tuple[str, Generate]:
    import ctranslate2

    generator = ctranslate2.Generator(model, device="cpu", inter_threads=1, intra_threads=threads)
    # It takes tokens by their names.
    names = json.loads((Path(model) / "vocabulary.json").read_text())

    def generate(prompts: list[list[int]], shared: int, output_tokens: int) -> list[list[float]]:
        times: list[list[float]] = [[] for _ in prompts]

        def note(step: ctranslate2.GenerationStepResult) -> bool:
            times[step.batch_id].append(perf_counter())
            return False

        generator.generate_batch(
            [[names[token] for token in prompt[shared:]] for prompt in prompts],
            static_prompt=[names[token] for token in prompts[0][:shared]] or None,
            min_length=output_tokens,
            max_length=output_tokens,
            include_prompt_in_result=False,
            beam_size=1,
            sampling_topk=1,
            callback=note,
        )
        return times

    return ctranslate2.__version__, generate


if __name__ == "__main__":
    main(open_model)
