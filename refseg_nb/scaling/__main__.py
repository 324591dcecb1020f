"`python -m refseg_nb.scaling` measures how time and memory grow."

from refseg_nb.scaling.out import main

main()
