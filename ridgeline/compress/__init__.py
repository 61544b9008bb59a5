"""How a quantized model is made: grids, GPTQ, learned rounding, scaling, calibration, recipes."""
