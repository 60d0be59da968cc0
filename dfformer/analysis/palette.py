"""The colours of all figures: a grey, Okabe and Ito's, and Tol's wine, which are distinct for any colour vision."""

BLACK, GREY = "#000000", "#7f7f7f"
BLUE, SKY, GREEN = "#0072b2", "#56b4e9", "#009e73"
VERMILLION, ORANGE, PURPLE, WINE = "#d55e00", "#e69f00", "#cc79a7", "#882255"
CYCLE = (BLUE, VERMILLION, GREEN, ORANGE, PURPLE, SKY)  # of lines without colours of their own
