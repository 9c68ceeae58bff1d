"""Running a program in torch: whole, layer by layer, or for its gradients; and the text it runs on."""
