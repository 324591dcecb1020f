"`python -m refseg_nb.course readme|stubs` is what the Makefile calls."

import sys

from refseg_nb.course.tools import main

main(*sys.argv[1:])
