#ifdef EMU_RACE
#endif
