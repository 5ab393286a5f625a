"""Speed and memory of contracap next to other tools. Needs a checkout: not part of the installed package."""
