/* Compiles only if thimble.h is C99 and needs no other header, and if struct_size is the first member of structures. */
#include "thimble/thimble.h"

#define FIRST(type) typedef char type##_begins_with_its_size[offsetof(type, struct_size) == 0 ? 1 : -1]
FIRST(thimble_profile_info);
FIRST(thimble_layer_info);
FIRST(thimble_codec_args);
FIRST(thimble_codec_info);
FIRST(thimble_context_args);
FIRST(thimble_encode_args);
FIRST(thimble_decode_args);
FIRST(thimble_attend_args);
