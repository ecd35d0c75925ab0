"""Ask an exported model through llama.cpp alone: python examples/ask_llama_cpp.py FOLDER "a question".

FOLDER comes from ``qrosa export RUN --output FOLDER --format gguf``; the chat template is in the file.
"""

import argparse
from pathlib import Path

from llama_cpp import Llama


def main() -> None:
    """Answer one question."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", help="what qrosa exported")
    parser.add_argument("question")
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()

    model = Llama(str(Path(options.folder) / "model.gguf"), n_ctx=2048, verbose=False)
    answer = model.create_chat_completion(
        messages=[{"role": "user", "content": options.question}], max_tokens=options.max_tokens, temperature=0.0
    )
    print(answer["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
