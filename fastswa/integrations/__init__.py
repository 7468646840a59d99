"Averages in other people's training loops: one adapter for each, imported by its own name, with its framework"
