"""``python -m hf_dualadam SCRIPT.py ARGS...``: the same as the console command ``hf-dualadam``."""

from hf_dualadam.cli import main

if __name__ == "__main__":
    main()
