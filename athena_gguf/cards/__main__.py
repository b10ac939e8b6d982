from athena_gguf.cards.child import main

main()
