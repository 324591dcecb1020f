"`python -m refseg_nb` is the command `refseg`."

from refseg_nb.cli import app

app(prog_name="refseg")
