"""The code of the experiments that the commands in launch/ run; not part of the installed package."""
