"""transformers: `generate` in float32 on one static batch, padded on the left; nothing is shared between prompts."""

from time import perf_counter

from adapter import Generate, main


def open_model(model: str, threads: int) -> tuple[str, Generate]:
    import torch
    import transformers

    torch.set_num_threads(threads)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], shared: int, output_tokens: int) -> list[list[float]]:
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        steps: list[float] = []

        def note(ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
            steps.append(perf_counter())
            return torch.zeros(len(ids), dtype=torch.bool)

        with torch.inference_mode():
            loaded.generate(
                input_ids=ids,
                attention_mask=mask,
                do_sample=False,
                min_new_tokens=output_tokens,
                max_new_tokens=output_tokens,
                stopping_criteria=transformers.StoppingCriteriaList([note]),
            )
        return [steps for _ in prompts]

    return transformers.__version__, generate


if __name__ == "__main__":
    main(open_model)
