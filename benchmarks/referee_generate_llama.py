"""llama.cpp's side of `benchmarks.generate`; runs in a Python that has llama-cpp-python, but not gptjax."""

import ctypes
import json
import sys
import tempfile
import time

import llama_cpp
import numpy as np
from llama_cpp import llama

TYPES = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "BF16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
}
QUIET = llama_cpp.llama_log_callback(lambda *_: None)  # as long as the module, for the library calls it at the very end


def main(kind, file, plain_buffers):
    """Answers each line [batch, context, new], batch 1, with the seconds that reading and greedy writing take."""
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p())
    if plain_buffers:
        defaults = llama_cpp.llama_model_default_params

        def without_extra_buffers():
            params = defaults()
            params.use_extra_bufts = False
            return params

        llama.llama_cpp.llama_model_default_params = without_extra_buffers
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/model.gguf"
        params = llama_cpp.llama_model_quantize_default_params()
        # Its own mixture: with four bits the tied embedding keeps more, as on the other side.
        params.nthread, params.ftype, params.allow_requantize = 2, TYPES[kind], True
        if llama_cpp.llama_model_quantize(file.encode(), path.encode(), ctypes.byref(params)):
            sys.exit(f"llama.cpp does not quantize {file} to {kind}")
        model = llama.Llama(path, n_ctx=1024, n_threads=2, n_threads_batch=2, use_mmap=False, verbose=False)
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        question = json.loads(line)
        if question == ["ready"]:
            print(0.0, flush=True)
            continue
        _, context, new = question
        tokens = rng.integers(0, model.n_vocab(), context).tolist()
        started = time.perf_counter()
        model.reset()
        for _ in range(new):
            model.eval(tokens)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (model.n_vocab(),))
            tokens = [int(logits.argmax())]
        print(time.perf_counter() - started, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "plain")
