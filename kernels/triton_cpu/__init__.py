"""A backend of Triton's for the CPU: `kernel[grid](...)` on CPU tensors just works, with the number formats of a GPU.

    kernel ─ Triton's front end ─▶ tile IR ─ lower.py ─▶ C++ ─ g++ ─▶ shared object ─ driver.py ─▶ programs of the grid on all cores

Triton finds it by its own entry points (group `triton.backends`); nothing of Triton is patched. It is there to prove kernels without a
GPU: every float of 16 or 8 bits is rounded as the hardware does, to the nearest and ties to even, and with HEADRACE_TRITON_CHECK=1
every access is held against the tensor that its pointer was made from, scratch is filled with NaN, and two programs of a launch that touch
one place are told, where one of them changes it and nothing orders them (`checks.hpp` says what does). Products are float32's own,
whatever `input_precision` allows. Programs begin in order: one may wait for those before it, and never for those behind it. It is inactive
where torch has a GPU, needs an x86-64 with AVX2, and refuses by name what it cannot lower: inline assembly, scaled products,
functions that are not inlined, and what C++ lacks of libdevice.
"""
