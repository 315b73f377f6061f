"""The `gptmoe` command: each module holds one group of commands, `main.py` joins them."""
