package store_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/weftnet/weft/store"
)

func TestIdentityIsMadeOnceAndNeverReplaced(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	first, err := store.LoadIdentity(dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "host.key")
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("key file: %v, %v", st, err)
	}
	again, err := store.LoadIdentity(dir)
	if err != nil || again.ID != first.ID || !again.Key.Equal(first.Key) {
		t.Errorf("loaded again: %s, %v, want %s", again.ID, err, first.ID)
	}
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for name, bad := range map[string][]byte{"empty": {}, "cut": raw[:len(raw)/2], "text": []byte("not a key\n")} {
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if id, err := store.LoadIdentity(dir); err == nil {
			t.Errorf("%s key file gave identity %s", name, id.ID)
		}
		if now, err := os.ReadFile(path); err != nil || string(now) != string(bad) {
			t.Errorf("%s key file was changed (%v)", name, err)
		}
	}
}
