"""How the built-in encoder is made: `python -m training --help`. Needs torch and transformers; the hub never imports this."""
