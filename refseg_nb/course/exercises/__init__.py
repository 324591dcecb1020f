"The checks of the exercises, one module a chapter: `from refseg_nb.course.exercises.ch07 import check_dice_from_iou`."
