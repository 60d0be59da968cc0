"""The colours of all pictures: Okabe and Ito's, which readers with any colour vision tell apart, and a grey."""

BLACK, GREY = "#000000", "#7f7f7f"
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
VERMILLION, ORANGE, PURPLE = "#d55e00", "#e69f00", "#cc79a7"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)  # of lines in a picture without names of their own

# The families of models, in all pictures that compare some: colours, and markers for those who see none.
MODELS = {
    "dfformer": (BLUE, "o"),
    "cdfformer": (GREEN, "s"),
    "gfformer": (PURPLE, "D"),
    "convformer": (VERMILLION, "^"),
    "caformer": (BLACK, "v"),
    "convnext": (ORANGE, "P"),
    "swin": (SKY, "*"),
}
