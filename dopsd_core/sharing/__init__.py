"""What a LoRA file says of itself to others: the header that managers show, and the card for the Hugging Face Hub."""
