"""A plug-in for verl, loaded by VERL_USE_EXTERNAL_MODULES; docs/frameworks/verl.md has the flags."""
