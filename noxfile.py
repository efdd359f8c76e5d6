import nox

nox.options.default_venv_backend = "venv"
nox.options.reuse_venv = "yes"

VERSIONS = {  # torch: Python, torchvision
    "2.6.0": ("3.10", "0.21.0"),
    "2.11.0": ("3.12", "0.26.0"),
    "2.13.0": ("3.11", "0.28.0"),
    "2.15.0": ("3.13", "0.30.0"),
}


@nox.session
@nox.parametrize("python,torch", [(p, t) for t, (p, _) in VERSIONS.items()], ids=list(VERSIONS))
def versions(session, torch):
    session.install(f"torch=={torch}")
